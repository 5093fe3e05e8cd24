// Records where native llama.cpp's own round trip through a vocabulary changes the text: upstream ships the expected
// tokens of its vocabularies (.inp and .out) but not the text those tokens decode to.
//
//   dump_detokenize VOCAB.gguf... > detokenized.json
//
// Writes {"vocab": {"index of the input": "decoded text"}} for the inputs that do not come back as they went in.

#include "dump.h"

#include <climits>
#include <filesystem>
#include <fstream>
#include <iterator>

static std::vector<std::string> read_inputs(const std::string & path) {
    static const std::string separator = "\n__ggml_vocab_test__\n";
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        throw std::runtime_error("read " + path + ": no such file");
    }
    const std::string raw((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    std::vector<std::string> inputs;
    for (size_t pos = 0; pos < raw.size();) {
        const size_t next = raw.find(separator, pos);
        inputs.push_back(raw.substr(pos, next == std::string::npos ? next : next - pos));
        if (next == std::string::npos) {
            break;
        }
        pos = next + separator.size();
    }
    return inputs;
}

// The calls of upstream's test-tokenizer-0: no special tokens added or read, special tokens shown.
static std::string round_trip(const llama_vocab * vocab, const std::string & text) {
    std::vector<llama_token> tokens(text.size() + 8);
    const int n_tokens = llama_tokenize(vocab, text.c_str(), (int) text.size(), tokens.data(), (int) tokens.size(),
                                        /*add_special =*/ false, /*parse_special =*/ false);
    if (n_tokens < 0) {
        throw std::runtime_error("tokenize: more tokens than bytes");
    }
    std::string out(text.size() * 16 + 64, '\0');
    const int n_bytes = llama_detokenize(vocab, tokens.data(), n_tokens, &out[0], (int) out.size(),
                                         /*remove_special =*/ false, /*unparse_special =*/ true);
    if (n_bytes < 0) {
        throw std::runtime_error("detokenize: unexpectedly long text");
    }
    out.resize(n_bytes);
    return out;
}

static json changed_texts(const std::string & path) {
    llama_model_params params = llama_model_default_params();
    params.vocab_only = true;
    llama_model_ptr model(llama_model_load_from_file(path.c_str(), params));
    if (!model) {
        throw std::runtime_error("load " + path + ": llama_model_load_from_file failed");
    }
    const std::vector<std::string> inputs = read_inputs(path + ".inp");
    json changed = json::object();
    for (size_t i = 0; i < inputs.size(); i++) {
        const std::string text = round_trip(llama_model_get_vocab(model.get()), inputs[i]);
        if (text != inputs[i]) {
            changed[std::to_string(i)] = text;
        }
    }
    return changed;
}

static void run(int argc, char ** argv) {
    json out = json::object();
    for (int i = 1; i < argc; i++) {
        out[std::filesystem::path(argv[i]).filename().string()] = changed_texts(argv[i]);
    }
    printf("%s\n", out.dump(1).c_str());
}

int main(int argc, char ** argv) {
    return dump_main(argc, argv, 0, INT_MAX, "VOCAB.gguf...", run, /*is_loud =*/ false);
}
