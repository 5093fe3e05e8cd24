// JSON schema -> GBNF, by common's converter, and the sampler that holds an answer to its grammar.
#include "grammar.h"

#include "common.h"
#include "glue.h"
#include "json-schema-to-grammar.h"
#include "json.h"
#include "reasoning-budget.h"

#include <cmath>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <vector>

static void replace_all(std::string & text, const std::string & from, const std::string & to) {
    for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size()) {
        text.replace(at, from.size(), to);
    }
}

// What the converter's own rules allow too much:
// - halves of surrogate pairs, which are no characters, or one where the rule has counted two;
// - exponents beyond what a double holds;
// - names of further properties with quotes, backslashes and control characters in them, which end the text, or spell the name of
//   a property that has a schema of its own.
std::string pw_harden_grammar(const std::string & grammar) {
    std::istringstream lines(grammar);
    std::string hardened;
    for (std::string line; std::getline(lines, line);) {
        const size_t begin = line.find(" ::= ");
        const std::string rule = begin == std::string::npos ? "" : line.substr(0, begin);
        if (begin != std::string::npos && line.compare(begin + 5, 5, "[\"] (") == 0) {
            replace_all(line, "[^\"", "[^\"\\\\\\x00-\\x1F\\x7F");
        } else if (rule == "char") {
            replace_all(line, "[^\"\\\\\\x7F\\x00-\\x1F]", "[^\"\\\\\\x7F\\x00-\\x1F\\uD800-\\uDFFF]");
            replace_all(line, "\"u\" [0-9a-fA-F]{4}", "\"u\" ([0-9a-cA-CefEF] [0-9a-fA-F]{3} | [dD] [0-7] [0-9a-fA-F]{2})");
        } else if (line.find("integral-part) (\".\" decimal-part)?") != std::string::npos) {
            replace_all(line, "([eE] [-+]? integral-part)?", "([eE] [-+]? [0-9]{1,2})?");
        }
        hardened += line + "\n";
    }
    return hardened;
}

PW_EXPORT("pw_json_schema_to_grammar") char * pw_json_schema_to_grammar(const char * schema) {
    return pw_guard([&] { return pw_copy_text(pw_harden_grammar(json_schema_to_grammar(common_json::parse(schema)))); });
}

// -- UTF-8 as RFC 3629 has it, byte by byte -------------------------------------------------------------------------------------

// What may follow: so many bytes, the first of them from `low` to `high`.
struct utf8_state {
    uint8_t left = 0, low = 0x80, high = 0xBF;

    bool take(uint8_t byte) {
        if (left > 0) {
            const bool fits = byte >= low && byte <= high;
            low = 0x80, high = 0xBF, left--;
            return fits;
        }
        left = byte < 0x80 ? 0 : byte < 0xE0 ? 1 : byte < 0xF0 ? 2 : 3;
        low  = byte == 0xE0 ? 0xA0 : byte == 0xF0 ? 0x90 : 0x80;
        high = byte == 0xED ? 0x9F : byte == 0xF4 ? 0x8F : 0xBF;
        return byte < 0x80 || (byte >= 0xC2 && byte <= 0xF4);
    }

    bool take(const std::string & bytes) {
        bool fits = true;
        for (const char byte : bytes) {
            fits = fits && take((uint8_t) byte);
        }
        return fits;
    }
};

// -- the sampler ---------------------------------------------------------------------------------------------------------------

struct pw_constraint {
    const llama_vocab * vocab;
    llama_sampler *     grammar;  // may be null
    llama_sampler *     budget;   // may be null
    bool                is_lazy;
    utf8_state          text;

    // Reasoning is free: what looks like a tool call in it is none.
    bool is_held() const {
        if (!grammar || !budget || !is_lazy) {
            return grammar != nullptr;
        }
        const auto state = common_reasoning_budget_get_state(budget);
        return state == REASONING_BUDGET_IDLE || state == REASONING_BUDGET_DONE;
    }
};

static pw_constraint & of(const llama_sampler * sampler) {
    return *static_cast<pw_constraint *>(sampler->ctx);
}

void pw_accept_checked(llama_sampler * grammar, const llama_vocab * vocab, llama_token token) {
    llama_token_data       single = {token, 1.0f, 0.0f};
    llama_token_data_array array  = {&single, 1, -1, false};
    llama_sampler_apply(grammar, &array);
    if (single.logit == -INFINITY) {
        throw std::runtime_error("the grammar does not allow " + common_token_to_piece(vocab, token, true));
    }
    llama_sampler_accept(grammar, token);
}

static const char * name_of(const llama_sampler *) {
    return "grammar";
}

// As common_sampler_accept: what ends the reasoning may also be what wakes the grammar.
static void accept(llama_sampler * sampler, llama_token token) {
    pw_constraint & own = of(sampler);
    const bool was_held = own.is_held();
    if (!llama_vocab_is_eog(own.vocab, token)) {
        own.text.take(common_token_to_piece(own.vocab, token, true));
    }
    if (own.budget) {
        llama_sampler_accept(own.budget, token);
        const llama_tokens * end = common_reasoning_budget_get_end_match(own.budget);
        if (own.grammar && !was_held && end && common_reasoning_budget_get_state(own.budget) == REASONING_BUDGET_DONE) {
            for (const llama_token last : *end) {
                pw_accept_checked(own.grammar, own.vocab, last);
            }
        }
    }
    if (was_held) {
        llama_sampler_accept(own.grammar, token);
    }
}

static void apply(llama_sampler * sampler, llama_token_data_array * candidates) {
    pw_constraint & own = of(sampler);
    if (own.budget) {
        llama_sampler_apply(own.budget, candidates);
    }
    if (!own.is_held()) {
        return;
    }
    llama_sampler_apply(own.grammar, candidates);
    for (size_t i = 0; i < candidates->size; i++) {
        llama_token_data & candidate = candidates->data[i];
        if (candidate.logit > -INFINITY && !llama_vocab_is_eog(own.vocab, candidate.id)) {
            utf8_state text = own.text;
            if (!text.take(common_token_to_piece(own.vocab, candidate.id, true))) {
                candidate.logit = -INFINITY;
            }
        }
    }
}

static void reset(llama_sampler * sampler) {
    pw_constraint & own = of(sampler);
    own.text = {};
    for (llama_sampler * part : {own.grammar, own.budget}) {
        if (part) {
            llama_sampler_reset(part);
        }
    }
}

static void release(llama_sampler * sampler) {
    pw_constraint * own = &of(sampler);
    llama_sampler_free(own->grammar);
    llama_sampler_free(own->budget);
    delete own;
}

static llama_sampler * clone(const llama_sampler * sampler);

static llama_sampler_i INTERFACE = {name_of, accept, apply, reset, clone, release, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};

static llama_sampler * clone(const llama_sampler * sampler) {
    auto copy = std::make_unique<pw_constraint>(of(sampler));
    copy->grammar = copy->grammar ? llama_sampler_clone(copy->grammar) : nullptr;
    copy->budget  = copy->budget ? llama_sampler_clone(copy->budget) : nullptr;
    return llama_sampler_init(&INTERFACE, copy.release());
}

llama_sampler * pw_constraint_new(const llama_vocab * vocab, llama_sampler * grammar, llama_sampler * budget, bool is_lazy) {
    return llama_sampler_init(&INTERFACE, new pw_constraint{vocab, grammar, budget, is_lazy, {}});
}
