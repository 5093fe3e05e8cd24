// Records what native llama.cpp computes over scripts of context operations: settings of the KV cache and of RoPE, edits
// of the KV cache, states, adapters, embeddings, encoders.
//
//   dump_contexts FOLDER < SCENARIOS.json > RECORD.json
//
// SCENARIOS: [{"name", "model", "params": {...}, "steps": [[operation, argument...], ...]}]; files are in FOLDER. The
// record has, for each scenario, the rows that its steps put out: logits of the last token of a decode, or embeddings.

#include "dump.h"

#include <fstream>
#include <iostream>
#include <iterator>
#include <map>

static std::string folder;

static int number_of(const std::vector<std::string> & names, const std::string & name, int first) {
    for (size_t i = 0; i < names.size(); i++) {
        if (names[i] == name) {
            return (int) i + first;
        }
    }
    throw std::runtime_error("unknown name " + name);
}

static ggml_type type_of(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const char * known = ggml_type_name((ggml_type) i);
        if (known && name == known) {
            return (ggml_type) i;
        }
    }
    throw std::runtime_error("unknown type " + name);
}

static llama_context_ptr make_context(llama_model * model, const json & set) {
    llama_context_params params = llama_context_default_params();
    params.n_threads = params.n_threads_batch = 1;
    for (const auto & [key, value] : set.items()) {
        if (key == "n_ctx") { params.n_ctx = value; }
        else if (key == "n_seq_max") { params.n_seq_max = value; }
        else if (key == "n_ubatch") { params.n_ubatch = value; }
        else if (key == "kv_unified") { params.kv_unified = value; }
        else if (key == "swa_full") { params.swa_full = value; }
        else if (key == "embeddings") { params.embeddings = value; }
        else if (key == "type_k") { params.type_k = type_of(value); }
        else if (key == "type_v") { params.type_v = type_of(value); }
        else if (key == "rope_freq_base") { params.rope_freq_base = value; }
        else if (key == "rope_freq_scale") { params.rope_freq_scale = value; }
        else if (key == "yarn_ext_factor") { params.yarn_ext_factor = value; }
        else if (key == "yarn_attn_factor") { params.yarn_attn_factor = value; }
        else if (key == "yarn_beta_fast") { params.yarn_beta_fast = value; }
        else if (key == "yarn_beta_slow") { params.yarn_beta_slow = value; }
        else if (key == "yarn_orig_ctx") { params.yarn_orig_ctx = value; }
        else if (key == "rope_scaling_type") {
            params.rope_scaling_type = (llama_rope_scaling_type) number_of({ "none", "linear", "yarn", "longrope" }, value, 0);
        } else if (key == "pooling_type") {
            params.pooling_type = (enum llama_pooling_type) number_of({ "none", "mean", "cls", "last", "rank" }, value, 0);
        } else if (key == "attention_type") {
            params.attention_type = (llama_attention_type) number_of({ "causal", "non_causal" }, value, 0);
        } else if (key == "flash_attn_type") {
            params.flash_attn_type = (llama_flash_attn_type) number_of({ "auto", "disabled", "enabled" }, value, -1);
        } else {
            throw std::runtime_error("unknown parameter " + key);
        }
    }
    llama_context_ptr ctx(llama_init_from_model(model, params));
    if (!ctx) {
        throw std::runtime_error("make context: llama_init_from_model failed");
    }
    return ctx;
}

static std::vector<float> read_floats(const std::string & name) {
    std::ifstream file(folder + "/" + name, std::ios::binary);
    const std::string raw((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    std::vector<float> values(raw.size() / sizeof(float));
    memcpy(values.data(), raw.data(), values.size() * sizeof(float));
    if (values.empty()) {
        throw std::runtime_error("read " + name + ": empty or missing");
    }
    return values;
}

// Runs one scenario; what a step puts out goes to `rows`.
struct runner {
    llama_model * model;
    llama_context_ptr ctx;
    json          rows = json::array();
    std::map<std::string, llama_adapter_lora *> loras;

    void check(bool ok, const std::string & what) const {
        if (!ok) {
            throw std::runtime_error(what + " failed");
        }
    }

    void put(const float * values, int n) {
        check(values != nullptr, "getting an output");
        rows.push_back(std::vector<float>(values, values + n));
    }

    // [tokens, first position, [sequence, ...]]
    void compute(const json & step, bool encode) {
        const std::vector<llama_token> tokens = step.at(1);
        const std::vector<int> seqs = step.at(3);
        llama_batch batch = llama_batch_init((int) tokens.size(), 0, (int) seqs.size());
        batch.n_tokens = (int) tokens.size();
        for (int i = 0; i < batch.n_tokens; i++) {
            batch.token[i]    = tokens[i];
            batch.pos[i]      = (int) step.at(2) + i;
            batch.n_seq_id[i] = (int) seqs.size();
            for (size_t s = 0; s < seqs.size(); s++) {
                batch.seq_id[i][s] = seqs[s];
            }
            batch.logits[i] = i == batch.n_tokens - 1;
        }
        const int status = encode ? llama_encode(ctx.get(), batch) : llama_decode(ctx.get(), batch);
        llama_batch_free(batch);
        check(status == 0, encode ? "llama_encode" : "llama_decode");
    }

    // [file of embeddings, first position, sequence]
    void compute_embeddings(const json & step) {
        const std::vector<float> embd = read_floats(step.at(1));
        const int n_embd = llama_model_n_embd_inp(model);
        llama_batch batch = llama_batch_init((int) embd.size() / n_embd, n_embd, 1);
        batch.n_tokens = (int) embd.size() / n_embd;
        memcpy(batch.embd, embd.data(), embd.size() * sizeof(float));
        for (int i = 0; i < batch.n_tokens; i++) {
            batch.pos[i]       = (int) step.at(2) + i;
            batch.n_seq_id[i]  = 1;
            batch.seq_id[i][0] = step.at(3);
            batch.logits[i]    = i == batch.n_tokens - 1;
        }
        const int status = llama_decode(ctx.get(), batch);
        llama_batch_free(batch);
        check(status == 0, "llama_decode");
    }

    void set_loras(const json & wanted) {
        std::vector<llama_adapter_lora *> adapters;
        std::vector<float> scales;
        for (const auto & [name, scale] : wanted.items()) {
            if (!loras.count(name)) {
                loras[name] = llama_adapter_lora_init(model, (folder + "/" + name).c_str());
                check(loras[name] != nullptr, "llama_adapter_lora_init");
            }
            adapters.push_back(loras[name]);
            scales.push_back(scale);
        }
        llama_set_adapters_lora(ctx.get(), adapters.data(), adapters.size(), scales.data());
    }

    void session(const std::string & operation, const json & step) {
        const std::string path = folder + "/" + step.at(1).get<std::string>();
        std::vector<llama_token> tokens(256);
        size_t n = 0;
        if (operation == "save") {
            tokens = step.at(2).get<std::vector<llama_token>>();
            check(llama_state_save_file(ctx.get(), path.c_str(), tokens.data(), tokens.size()), "llama_state_save_file");
        } else if (operation == "seq_save") {
            tokens = step.at(2).get<std::vector<llama_token>>();
            check(llama_state_seq_save_file(ctx.get(), path.c_str(), step.at(3), tokens.data(), tokens.size()) > 0,
                  "llama_state_seq_save_file");
        } else if (operation == "load") {
            check(llama_state_load_file(ctx.get(), path.c_str(), tokens.data(), tokens.size(), &n), "llama_state_load_file");
        } else {
            check(llama_state_seq_load_file(ctx.get(), path.c_str(), step.at(2), tokens.data(), tokens.size(), &n) > 0,
                  "llama_state_seq_load_file");
        }
    }

    void run(const json & step) {
        const std::string operation = step.at(0);
        llama_memory_t memory = llama_get_memory(ctx.get());
        const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
        if (operation == "decode") { compute(step, false); }
        else if (operation == "encode") { compute(step, true); }
        else if (operation == "decode_embeddings") { compute_embeddings(step); }
        else if (operation == "logits") { put(llama_get_logits_ith(ctx.get(), -1), n_vocab); }
        else if (operation == "embeddings") { put(llama_get_embeddings_ith(ctx.get(), step.at(1)), llama_model_n_embd_out(model)); }
        else if (operation == "embeddings_seq") { put(llama_get_embeddings_seq(ctx.get(), step.at(1)), llama_model_n_embd_out(model)); }
        else if (operation == "clear") { llama_memory_clear(memory, true); }
        else if (operation == "seq_rm") { check(llama_memory_seq_rm(memory, step.at(1), step.at(2), step.at(3)), "seq_rm"); }
        else if (operation == "seq_cp") { llama_memory_seq_cp(memory, step.at(1), step.at(2), step.at(3), step.at(4)); }
        else if (operation == "seq_keep") { llama_memory_seq_keep(memory, step.at(1)); }
        else if (operation == "seq_add") { llama_memory_seq_add(memory, step.at(1), step.at(2), step.at(3), step.at(4)); }
        else if (operation == "seq_div") { llama_memory_seq_div(memory, step.at(1), step.at(2), step.at(3), step.at(4)); }
        else if (operation == "set_causal_attn") { llama_set_causal_attn(ctx.get(), step.at(1)); }
        else if (operation == "set_embeddings") { llama_set_embeddings(ctx.get(), step.at(1)); }
        else if (operation == "set_loras") { set_loras(step.at(1)); }
        else if (operation == "set_control_vector") {
            const std::vector<float> data = read_floats(step.at(1));
            check(llama_set_adapter_cvec(ctx.get(), data.data(), data.size(), llama_model_n_embd(model), step.at(2), step.at(3)) == 0,
                  "llama_set_adapter_cvec");
        }
        else if (operation == "save" || operation == "load" || operation == "seq_save" || operation == "seq_load") {
            session(operation, step);
        } else {
            throw std::runtime_error("unknown operation " + operation);
        }
    }
};

static json record(const json & scenario) {
    const std::string path = folder + "/" + scenario.at("model").get<std::string>();
    // A model of its own: making a context with YaRN changes the model.
    llama_model_ptr model(llama_model_load_from_file(path.c_str(), llama_model_default_params()));
    if (!model) {
        throw std::runtime_error("llama_model_load_from_file failed");
    }
    runner run = { model.get(), make_context(model.get(), scenario.at("params")), json::array(), {} };
    for (const json & step : scenario.at("steps")) {
        run.run(step);
    }
    return run.rows;
}

static void run_all(int, char ** argv) {
    folder = argv[1];
    json out = json::object();
    for (const json & scenario : json::parse(std::cin)) {
        const std::string name = scenario.at("name");
        try {
            out[name] = record(scenario);
        } catch (const std::exception & error) {
            throw std::runtime_error(name + ": " + error.what());
        }
    }
    printf("%s\n", out.dump().c_str());
}

int main(int argc, char ** argv) {
    return dump_main(argc, argv, 1, 1, "FOLDER < SCENARIOS.json", run_all);
}
