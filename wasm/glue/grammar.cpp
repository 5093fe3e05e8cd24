// JSON schema -> GBNF, by common's converter.
#include "glue.h"

#include "json-schema-to-grammar.h"
#include "json.h"

PW_EXPORT("pw_json_schema_to_grammar") char * pw_json_schema_to_grammar(const char * schema) {
    return pw_guard([&] { return pw_copy_text(json_schema_to_grammar(common_json::parse(schema))); });
}
