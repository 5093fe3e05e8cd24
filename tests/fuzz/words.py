"""The words that the readers of text know, and good texts of theirs to begin with."""

from __future__ import annotations

TEMPLATE_WORDS = (
    b" | ",
    *b"{{ |}} |{% |%} |{# |#}|for m in messages|endfor|if |elif |else|endif|set x = |endset|macro f(x)|endmacro|call "
    b"|filter |namespace(|range(|loop.index0|loop.last|loop.|messages|m.content|m['role']|tools|not |and |or |in "
    b"| is defined| is string| is none|[::-1]|[-1]|[1:]|~|**|//|%|tojson|tojson(indent=4)|length|trim|join(', ')"
    b"|default('')|items()|replace('a','b')|split('x')|strip()|upper|map(attribute='a')|selectattr('a')|reject|sort"
    b"|dictsort|unique|first|last|int|float|string|list|raise_exception('x')|strftime_now('%Y')|add_generation_prompt"
    b"|bos_token|f(f)|x.y.z|'x' * 3|{'a': 1}|[1, 2]|(1, 2)|true|none|1e400|9223372036854775807|\\u0041|generation"
    b"|endgeneration|break|continue".split(b"|"),
)

TEMPLATES = (
    b"{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}\n{% endfor %}"
    b"{% if add_generation_prompt %}<|assistant|>{% endif %}",
    b"{%- set ns = namespace(n=0, s='') -%}{% for m in messages[::-1] if m.role != 'x' %}"
    b"{% set ns.n = ns.n + loop.index0 %}{% set ns.s = ns.s ~ m.content[:2].upper() %}{% else %}none{% endfor %}"
    b"{{ ns.n }}:{{ ns.s }}",
    b"{% macro show(x, y=2) %}[{{ x|string }}-{{ y }}]{% endmacro %}{{ show(1) }}{{ show(messages|length, y='q') }}"
    b"{% call(z) show(3) %}{{ z }}{% endcall %}",
    b"{{ messages | tojson(indent=2) }}{{ {'a': [1, 2.5, none, true], 'b': {'c': 'd'}}.items() | list }}"
    b"{{ [3, 1, 2] | sort | join(',') }}{{ 'a b c'.split(' ') | list }}{{ messages|selectattr('role')|list }}",
    b"{% if messages[0].content is string and not (messages[0].role == 'system') %}{{ 'x' if 1 < 2 else 'y' }}"
    b"{{ 7 / 2 }}{{ 7 % 3 }}{{ -5 * 2 + 1.5 }}{{ 'a' in 'abc' }}{{ messages[-1]['content'] | replace('a', 'b') }}"
    b"{% endif %}",
    b"{% if tools %}{% for t in tools %}{{ t.function.name }}{{ t.function.parameters | tojson }}{% endfor %}"
    b"{% endif %}{%- for m in messages -%}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments }}{% endif %}"
    b"{{ m.content }}{%- endfor -%}",
    b"{% filter upper %}a{{ bos_token }}{% endfilter %}{# note #}{% set x %}captured{% endset %}{{ x ~ x|length }}"
    b"{% for k, v in {'p': 1, 'q': 2}.items() %}{{ loop.first }}{{ k }}={{ v }}{% endfor %}{{ range(0, 9, 2)|list }}",
)

GRAMMAR_WORDS = (
    b" | ",
    *b'root ::= | ::= |\n|"a"|\'|[a-z]|[^"\\\\]|[\\x00-\\xff]|.|(|)|*|+|?|{1,3}|{0,}|{2000}|{,5}| |# c\n|\\u1234'
    b'|\\U0010ffff|\\n|\\]|a-b ::= root|x ::= "y" x?|<token>|<[1]>|<[!2]>|ws|""|[]|{18446744073709551616}'.split(b"|"),
)

GRAMMARS = (
    b'root ::= "a" | [b-z]+',
    b'root ::= expr (("+" | "-") expr)*\nexpr ::= [0-9]+ | "(" root ")"',
    b'root ::= object\nobject ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}"\n'
    b'value ::= object | string | [0-9]+ | "true" | "null"\nstring ::= "\\"" [^"\\\\]* "\\""\nws ::= [ \\t\\n]*',
    b'root ::= item{1,4} "."\nitem ::= [^\\x00-\\x1f\\u00e9]{2} | "\\U0001F600"? | . "x"* # note\n',
    b'root ::= a? b+ c*\na ::= "x" | ""\nb ::= (a | c) "y"\nc ::= [a-c-] | [\\]]',
)

SCHEMA_WORDS = tuple(
    b"type object string array integer number boolean null properties required additionalProperties items prefixItems "
    b"minItems maxItems minLength maxLength pattern enum const anyOf oneOf allOf $ref $defs #/$defs/a # #/ "
    b"https://example.org/x#/a format date date-time time uuid minimum maximum exclusiveMinimum exclusiveMaximum ^a$ "
    b"^[a-z]{2,5}$ ^(a|b)*$ ^\\d+(\\.\\d+)?$ ^((((a)))){9}$ ^[^\\]]+$ ^a{1,99999}$".split()
)

SCHEMAS = (
    b'{"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}, "n": {"type": "integer", '
    b'"minimum": -3, "maximum": 1200}}, "required": ["name"], "additionalProperties": false}',
    b'{"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1, "maxItems": 4, '
    b'"$defs": {"a": {"enum": ["x", 1, null]}}}',
    b'{"anyOf": [{"type": "string", "pattern": "^[a-z]{2,5}(-\\\\d+)?$"}, {"type": "null"}, {"const": {"k": [1]}}]}',
    b'{"allOf": [{"properties": {"a": {"type": "number"}}}, {"properties": {"b": {"type": ["boolean", "null"]}}}]}',
    b'{"type": "object", "additionalProperties": {"type": "string", "format": "date-time"}}',
    b'{"prefixItems": [{"type": "integer", "exclusiveMaximum": 99}, {"type": "string", "format": "uuid"}]}',
    b'{"$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}}, '
    b'"$ref": "#/$defs/node"}',
)

CHAT_WORDS = (
    *b"messages role content user assistant system tool tool_calls tool_call_id name function arguments type text "
    b"image_url tools parameters properties template template_kwargs add_generation_prompt enable_thinking "
    b"reasoning_content id tool_choice parallel_tool_calls json_schema reasoning prefill auto required".split(),
    b'{"a": 1}',
)

CHATS = (
    b'{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}',
    b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, '
    b'{"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}], "add_generation_prompt": false}',
    b'{"messages": [{"role": "user", "content": "weather?"}, {"role": "assistant", "content": null, "tool_calls": '
    b'[{"type": "function", "id": "1", "function": {"name": "weather", "arguments": "{\\"city\\": \\"Bern\\"}"}}]}, '
    b'{"role": "tool", "tool_call_id": "1", "content": "sun"}], "tools": [{"type": "function", "function": '
    b'{"name": "weather", "description": "w", "parameters": {"type": "object", "properties": '
    b'{"city": {"type": "string"}}, "required": ["city"]}}}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "template_kwargs": {"a": [1, {"b": null}]}, '
    b'"enable_thinking": false}',
)

PROMPTS = (
    b"Hello, world",
    b"<s>a</s> <|im_start|>user\n",
    "\u4f60\u597d \U0001f600 e\u0301".encode(),
    b"  \t\n 12345 don't 3.14",
    b"<0x41><unk> \xe2\x96\x81ab",
    b"a" * 300,
    b"\xff\xfe\x80",
    b"AB ab\r\n\r\n    x=1;",
)
