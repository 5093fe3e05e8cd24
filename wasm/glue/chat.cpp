// Chat templates: OpenAI-style messages in, the prompt out, by common's Jinja engine and the model's own template.
#include "glue.h"

#include "chat.h"
#include "json.h"

#include <map>

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
    inputs.parallel_tool_calls   = flag_of(request, "parallel_tool_calls", false);
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
    if (request.contains("template_kwargs") && request.at("template_kwargs").is_object()) {
        for (const auto & item : request.at("template_kwargs").items()) {
            inputs.chat_template_kwargs[item.key()] = item.value().dump();
        }
    }
    return inputs;
}

PW_EXPORT("pw_chat_apply") char * pw_chat_apply(const llama_model * model, const char * request_text) {
    return pw_guard([&] {
        const common_json request   = common_json::parse(request_text);
        const auto        templates = common_chat_templates_init(model, text_of(request, "template"));
        const auto        params    = common_chat_templates_apply(templates.get(), inputs_from(request));
        common_json answer;
        answer["prompt"]            = params.prompt;
        answer["grammar"]           = params.grammar;
        answer["grammar_lazy"]      = params.grammar_lazy;
        answer["stops"]             = params.additional_stops;
        answer["generation_prompt"] = params.generation_prompt;
        answer["format"]            = common_chat_format_name(params.format);
        return pw_copy_text(answer.dump_safe());
    });
}

// The template the model brings (variant "": the default one), or what llama.cpp takes in its place.
PW_EXPORT("pw_chat_template_source") char * pw_chat_template_source(const llama_model * model, const char * variant) {
    return pw_guard([&] {
        const auto templates = common_chat_templates_init(model, "");
        return pw_copy_text(common_chat_templates_source(templates.get(), variant));
    });
}
