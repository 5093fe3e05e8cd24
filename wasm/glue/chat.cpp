// Chat: OpenAI-style messages and tools in, a prompt, a grammar and a parser out, by common's Jinja engine and the model's own
// template; then what the model says in, messages and tool calls out, whole or in the pieces in which it comes.
#include "chat.h"

#include "glue.h"
#include "grammar.h"
#include "json.h"
#include "reasoning-budget.h"
#include "sampling.h"

#include <algorithm>
#include <climits>
#include <map>
#include <memory>
#include <regex>
#include <set>
#include <stdexcept>
#include <vector>

static std::string text_of(const common_json & request, const char * key) {
    return request.contains(key) && request.at(key).is_string() ? request.at(key).get<std::string>() : "";
}

static bool flag_of(const common_json & request, const char * key, bool otherwise) {
    return request.contains(key) && request.at(key).is_boolean() ? request.at(key).get<bool>() : otherwise;
}

static common_chat_templates_inputs inputs_from(const common_json & request) {
    common_chat_templates_inputs inputs;
    inputs.messages              = common_chat_msgs_parse_oaicompat(request.at("messages"));
    inputs.add_generation_prompt = flag_of(request, "add_generation_prompt", true);
    inputs.enable_thinking       = flag_of(request, "enable_thinking", true);
    inputs.grammar               = text_of(request, "grammar");
    if (request.contains("json_schema") && !request.at("json_schema").is_null()) {
        inputs.json_schema = request.at("json_schema").dump();
    }
    if (request.contains("tools") && !request.at("tools").is_null()) {
        inputs.tools = common_chat_tools_parse_oaicompat(request.at("tools"));
    }
    if (const std::string choice = text_of(request, "tool_choice"); !choice.empty()) {
        inputs.tool_choice = common_chat_tool_choice_parse_oaicompat(choice);
    }
    if (const std::string format = text_of(request, "reasoning_format"); !format.empty()) {
        inputs.reasoning_format = common_reasoning_format_from_name(format);
    }
    if (request.contains("continue_final_message")) {
        inputs.continue_final_message = common_chat_continuation_parse(request.at("continue_final_message"));
    }
    if (inputs.continue_final_message != COMMON_CHAT_CONTINUATION_NONE) {
        inputs.add_generation_prompt = false;
    }
    if (request.contains("template_kwargs") && request.at("template_kwargs").is_object()) {
        for (const auto & item : request.at("template_kwargs").items()) {
            inputs.chat_template_kwargs[item.key()] = item.value().dump();
        }
    }
    return inputs;
}

// What one answer is generated and read with.
struct pw_chat {
    common_chat_params                 params;
    common_chat_parser_params          syntax;
    std::map<llama_token, std::string> preserved;  // control tokens that are part of the text, as markers of tool calls are
    std::vector<std::string>           triggers;   // of a lazy grammar: patterns, and tokens
    std::vector<llama_token>           trigger_tokens;
    std::map<std::string, bool>        caps;
    bool                               takes_tools = true;
    common_chat_input                  input;      // what the model has said so far
    common_chat_msg                    message;    // and what that was read as
    std::set<size_t>                   announced;  // tool calls whose name has been told
};

static std::vector<llama_token> tokens_of(const llama_vocab * vocab, const std::string & text) {
    return common_tokenize(vocab, text, false, true);
}

// As common_sampler_init has it: words become patterns, whole patterns are anchored.
static void add_trigger(pw_chat & chat, const llama_vocab * vocab, const common_grammar_trigger & trigger) {
    switch (trigger.type) {
        case COMMON_GRAMMAR_TRIGGER_TYPE_WORD: {
            const std::vector<llama_token> tokens = tokens_of(vocab, trigger.value);
            if (tokens.size() == 1) {
                chat.preserved.emplace(tokens[0], common_token_to_piece(vocab, tokens[0], true));
                chat.trigger_tokens.push_back(tokens[0]);
            } else {
                chat.triggers.push_back(regex_escape(trigger.value));
            }
            break;
        }
        case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN: chat.triggers.push_back(trigger.value); break;
        case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN_FULL: {
            const std::string & pattern = trigger.value;
            chat.triggers.push_back(pattern.empty() ? "^$"
                                                    : (pattern.front() != '^' ? "^" : "") + pattern +
                                                          (pattern.back() != '$' ? "$" : ""));
            break;
        }
        case COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN: chat.trigger_tokens.push_back(trigger.token); break;
    }
}

// Whether an answer without tool calls comes through the parser: where the template's format of tool calls is not known,
// upstream makes a parser that takes nothing.
static bool keeps_text(const pw_chat & chat) {
    try {
        return !common_chat_parse(common_chat_input("text"), false, chat.syntax).empty();
    } catch (const std::exception &) {
        return true;  // a format in which plain text is none
    }
}

// A required call comes at once: where upstream's grammar lets text stand before it, a weak model would write nothing else.
static std::string without_preamble(const std::string & grammar) {
    static const std::regex text(" until-[0-9]+\\?");
    const size_t begin = grammar.compare(0, 9, "root ::= ") == 0 ? 0 : grammar.find("\nroot ::= ");
    if (begin == std::string::npos) {
        return grammar;
    }
    const size_t end = grammar.find('\n', begin + 1);
    const std::string root = grammar.substr(begin, end - begin);
    return grammar.substr(0, begin) + std::regex_replace(root, text, "") + (end == std::string::npos ? "" : grammar.substr(end));
}

static pw_chat apply(const llama_model * model, const common_json & request) {
    const llama_vocab *                vocab     = llama_model_get_vocab(model);
    const auto                         templates = common_chat_templates_init(model, text_of(request, "template"));
    common_chat_templates_inputs       inputs    = inputs_from(request);
    pw_chat                            chat;
    chat.caps                  = common_chat_templates_get_caps(templates.get());
    inputs.parallel_tool_calls = flag_of(request, "parallel_tool_calls", chat.caps["supports_parallel_tool_calls"]);
    chat.params         = common_chat_templates_apply(templates.get(), inputs);
    chat.syntax         = common_chat_parser_params(chat.params);
    chat.syntax.parser  = std::move(chat.params.parser);
    chat.params.grammar = pw_harden_grammar(chat.params.grammar);
    for (const std::string & text : chat.params.preserved_tokens) {
        if (const auto tokens = tokens_of(vocab, text); tokens.size() == 1) {
            chat.preserved.emplace(tokens[0], text);
        }
    }
    for (const common_grammar_trigger & trigger : chat.params.grammar_triggers) {
        add_trigger(chat, vocab, trigger);
    }
    if (!inputs.tools.empty() && inputs.tool_choice != COMMON_CHAT_TOOL_CHOICE_NONE) {
        const bool is_required = inputs.tool_choice == COMMON_CHAT_TOOL_CHOICE_REQUIRED;
        if (is_required) {
            chat.params.grammar = without_preamble(chat.params.grammar);
        }
        chat.takes_tools = chat.caps["supports_tool_calls"] && (is_required ? !chat.params.grammar.empty() : keeps_text(chat));
    }
    chat.message.role = "assistant";
    if (inputs.continue_final_message != COMMON_CHAT_CONTINUATION_NONE) {
        chat.message = common_chat_parse(chat.input, true, chat.syntax);  // what was given is not told again
    }
    return chat;
}

static std::string describe(const pw_chat & chat) {
    common_json answer, preserved = common_json::object(), tokens = common_json::array();
    for (const auto & [token, text] : chat.preserved) {
        preserved[std::to_string(token)] = text;
    }
    for (const llama_token token : chat.trigger_tokens) {
        tokens.push_back(token);
    }
    answer["prompt"]            = chat.params.prompt;
    answer["grammar"]           = chat.params.grammar;
    answer["grammar_lazy"]      = chat.params.grammar_lazy;
    answer["grammar_triggers"]  = chat.triggers;
    answer["trigger_tokens"]    = tokens;
    answer["preserved"]         = preserved;
    answer["stops"]             = chat.params.additional_stops;
    answer["generation_prompt"] = chat.params.generation_prompt;
    answer["format"]            = common_chat_format_name(chat.params.format);
    answer["thinks"]            = !chat.params.thinking_start_tag.empty() && !chat.params.thinking_end_tags.empty();
    answer["takes_tools"]       = chat.takes_tools;
    return answer.dump_safe();
}

// Everything about the answer to a conversation.
PW_EXPORT("pw_chat_apply") char * pw_chat_apply(const llama_model * model, const char * request) {
    return pw_guard([&] { return pw_copy_text(describe(apply(model, common_json::parse(request)))); });
}

// The same, to be kept: pw_chat_feed reads the answer with it, pw_chat_constraint makes the sampler beside the chain.
PW_EXPORT("pw_chat_new") pw_chat * pw_chat_new(const llama_model * model, const char * request) {
    return pw_guard([&] { return new pw_chat(apply(model, common_json::parse(request))); });
}

PW_EXPORT("pw_chat_describe") char * pw_chat_describe(const pw_chat * chat) {
    return pw_guard([&] { return pw_copy_text(describe(*chat)); });
}

PW_EXPORT("pw_chat_free") void pw_chat_free(pw_chat * chat) {
    delete chat;
}

// -- reading the answer -----------------------------------------------------------------------------------------------------------

static common_json delta_of(const char * key, const std::string & text) {
    common_json delta = common_json::object();
    delta[key]        = text;
    return delta;
}

static common_json call_delta(size_t index, const common_chat_tool_call * header, const std::string & arguments) {
    common_json call = common_json::object(), function = common_json::object();
    call["index"] = (int64_t) index;
    if (header) {
        call["id"]       = header->id;
        call["type"]     = "function";
        function["name"] = header->name;
    }
    function["arguments"] = arguments;
    call["function"]      = function;
    common_json delta = common_json::object(), calls = common_json::array();
    calls.push_back(call);
    delta["tool_calls"] = calls;
    return delta;
}

// A call is announced, with its name and id, when these can change no more: with the first of its arguments, with the next
// call, or at the end.
static void tell_call(pw_chat & chat, size_t index, const std::string & arguments, bool is_certain, common_json & deltas) {
    const common_chat_tool_call & call = chat.message.tool_calls[index];
    const bool is_new = chat.announced.count(index) == 0;
    if (call.name.empty() || (arguments.empty() && !(is_new && is_certain))) {
        return;
    }
    chat.announced.insert(index);
    // What came of the arguments before the name did was not told either.
    deltas.push_back(call_delta(index, is_new ? &call : nullptr, is_new ? call.arguments : arguments));
}

static common_json tell(pw_chat & chat, const common_chat_msg & before, bool is_last) {
    common_json deltas = common_json::array();
    const size_t n_calls = chat.message.tool_calls.size();
    for (const common_chat_msg_diff & diff : common_chat_msg_diff::compute_diffs(before, chat.message)) {
        if (!diff.reasoning_content_delta.empty()) {
            deltas.push_back(delta_of("reasoning_content", diff.reasoning_content_delta));
        }
        if (!diff.content_delta.empty()) {
            deltas.push_back(delta_of("content", diff.content_delta));
        }
        if (diff.tool_call_index < n_calls) {
            const bool is_certain = is_last || diff.tool_call_index + 1 < n_calls;
            tell_call(chat, diff.tool_call_index, diff.tool_call_delta.arguments, is_certain, deltas);
        }
    }
    for (size_t index = 0; index < n_calls; index++) {
        tell_call(chat, index, "", is_last || index + 1 < n_calls, deltas);
    }
    return deltas;
}

// Take a further piece of the answer, valid UTF-8, and tell what is new in the message as OpenAI's deltas. Throws for an answer
// that is not in the template's format.
PW_EXPORT("pw_chat_feed") char * pw_chat_feed(pw_chat * chat, const char * text, int32_t n, int32_t is_last) {
    return pw_guard([&] {
        chat->input.append(std::string(text, n), LLAMA_TOKEN_NULL);
        common_chat_msg found;
        try {
            found = common_chat_parse(chat->input, !is_last, chat->syntax);
        } catch (const std::exception &) {
            if (is_last) {
                throw;
            }
        }
        const common_chat_msg before = chat->message;
        if (!found.empty()) {
            chat->message = std::move(found);
        }
        return pw_copy_text(tell(*chat, before, is_last).dump_safe());
    });
}

// -- what the answer may be -------------------------------------------------------------------------------------------------------

// The last of the tokens, whose text is `text`; none where it does not begin with a token.
static std::vector<llama_token> last_of(const llama_vocab * vocab, const std::vector<llama_token> & tokens, const std::string & text) {
    std::string tail;
    for (size_t i = tokens.size(); i-- > 0 && tail.size() < text.size();) {
        tail = common_token_to_piece(vocab, tokens[i], true) + tail;
        if (tail == text) {
            return {tokens.begin() + i, tokens.end()};
        }
    }
    return {};
}

// The tokens that the template has already put into the prompt. Where the tokenizer begins with a space of its own, that is left
// out; where it makes one token of it and what follows, behind a line feed it does not.
static std::vector<llama_token> prefill_of(const llama_vocab * vocab, const std::string & prompt) {
    const auto tokens = tokens_of(vocab, prompt);
    for (const auto & found : {last_of(vocab, tokens, prompt), last_of(vocab, tokens_of(vocab, "\n" + prompt), prompt)}) {
        if (!found.empty()) {
            return found;
        }
    }
    return tokens;
}

static llama_sampler * grammar_of(const pw_chat & chat, const llama_vocab * vocab, const std::vector<llama_token> & prefill) {
    std::vector<const char *> patterns;
    for (const std::string & trigger : chat.triggers) {
        patterns.push_back(trigger.c_str());
    }
    const char * text = chat.params.grammar.c_str();
    llama_sampler * grammar =
        chat.params.grammar_lazy
            ? llama_sampler_init_grammar_lazy_patterns(vocab, text, "root", patterns.data(), patterns.size(),
                                                       chat.trigger_tokens.data(), chat.trigger_tokens.size())
            : llama_sampler_init_grammar(vocab, text, "root");
    if (!grammar) {
        throw std::runtime_error("the grammar does not parse");
    }
    if (!chat.params.grammar_lazy) {
        try {
            for (const llama_token token : prefill) {
                pw_accept_checked(grammar, vocab, token);
            }
        } catch (...) {
            llama_sampler_free(grammar);
            throw;
        }
    }
    return grammar;
}

static llama_sampler * budget_of(const pw_chat & chat, const llama_vocab * vocab, const common_json & request) {
    const int32_t budget = request.contains("budget") && request.at("budget").is_number_integer() ? request.at("budget").get<int>() : -1;
    const auto & ends = chat.params.thinking_end_tags;
    if (chat.params.thinking_start_tag.empty() || ends.empty() || (budget < 0 && !chat.params.grammar_lazy)) {
        return nullptr;
    }
    std::vector<std::vector<llama_token>> end_tokens;
    for (const std::string & end : ends) {
        end_tokens.push_back(prefill_of(vocab, end));
    }
    const auto forced = prefill_of(vocab, text_of(request, "budget_message") + ends.front());
    return common_reasoning_budget_init(vocab, {prefill_of(vocab, chat.params.thinking_start_tag)}, end_tokens, forced,
                                        budget < 0 ? INT_MAX : budget);
}

// The sampler beside the chain: the grammar, and the end of reasoning that has used up its budget. Null where there is neither.
PW_EXPORT("pw_chat_constraint")
llama_sampler * pw_chat_constraint(const pw_chat * chat, const llama_model * model, const char * request_text) {
    return pw_guard([&]() -> llama_sampler * {
        const llama_vocab * vocab   = llama_model_get_vocab(model);
        const common_json   request = common_json::parse(request_text);
        const auto          prefill = prefill_of(vocab, chat->params.generation_prompt);
        llama_sampler * grammar = chat->params.grammar.empty() ? nullptr : grammar_of(*chat, vocab, prefill);
        llama_sampler * budget  = budget_of(*chat, vocab, request);
        for (const llama_token token : prefill) {
            // What follows in the prompt is not what was to be forced.
            if (budget && common_reasoning_budget_get_state(budget) != REASONING_BUDGET_FORCING) {
                llama_sampler_accept(budget, token);
            }
        }
        return grammar || budget ? pw_constraint_new(vocab, grammar, budget, chat->params.grammar_lazy) : nullptr;
    });
}

// The template the model brings (variant "": the default one), or what llama.cpp takes in its place.
PW_EXPORT("pw_chat_template_source") char * pw_chat_template_source(const llama_model * model, const char * variant) {
    return pw_guard([&] {
        const auto templates = common_chat_templates_init(model, "");
        return pw_copy_text(common_chat_templates_source(templates.get(), variant));
    });
}
