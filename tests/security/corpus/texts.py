"""Faults of grammars, chat templates and JSON: recursion without a bound, loops without an end, and code."""

from __future__ import annotations

from .record import Case, Maker

DEEP = 100_000


def _grammar(text: str) -> Maker:
    return lambda seeds: (seeds.model, text.encode())


def _template(text: str) -> Maker:
    return lambda seeds: (seeds.model, text.encode())


def _chain(n: int) -> str:
    return "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1}" for i in range(n)) + f'\nr{n} ::= "a"'


_PROBES = (
    "{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__ }}{{ self.__init__.__globals__.__builtins__ }}"
    "{{ messages.__class__.__base__.__subclasses__() }}{{ lipsum.__globals__['os'].popen('id').read() }}"
)
_FORMATS = "{{ '{0.__class__.__mro__}'.format(messages) }}{{ ('{0.__cl' + 'ass__}')|attr('format')(messages) }}"

GRAMMARS = (
    Case("issue-6492", "#6492, #7083, #3801", "a rule that begins with itself", "grammar",
         _grammar('root ::= root "a"'), "RequestError", "left recursion"),
    Case("issue-6492-indirect", "#6492 (indirect)", "rules that begin with each other", "grammar",
         _grammar('root ::= x "a"\nx ::= y? root\ny ::= "b"'), "RequestError", "left recursion"),
    Case("cve-2026-2069", "CVE-2026-2069, #18988", "repetitions inside repetitions", "grammar",
         _grammar('root ::= ((((("a"*)*)*)*)*)* "b"'), "ok"),
    Case("issue-26600", "#26600, PR #26602 (still open)", "60,000 nested groups", "grammar",
         _grammar("root ::= " + "(" * 60_000 + '"a"' + ")" * 60_000), "RequestError", "nested"),
    Case("issue-26602", "#26602 (still open)", "a chain of 100,000 rules", "grammar",
         _grammar(_chain(DEEP)), "RequestError", "nest"),
    Case("issue-18990", "#18990 (still open)", "no rule to begin with", "grammar",
         _grammar('start ::= "a"'), "RequestError", "does not contain a 'root'"),
    Case("undefined-rule", "#18990 (undefined)", "a rule that is not defined", "grammar",
         _grammar("root ::= missing"), "RequestError", "ndefined"),
    Case("issue-19086", "#19086", "up to 2^31 repetitions", "grammar",
         _grammar('root ::= "a"{0,2147483648}'), "ok"),
    Case("issue-19086-nested", "#19086 (nested)", "2000 repetitions of 2000 repetitions", "grammar",
         _grammar('root ::= (("a"{2000}){2000}){2000}'), "RequestError"),
    Case("repetition-reversed", "ours", "a repetition that ends before it begins", "grammar",
         _grammar('root ::= "a"{5,2}'), "RequestError", "ends before"),
    Case("repetition-overflow", "ours (2^64)", "2^64 + 1 repetitions", "grammar",
         _grammar('root ::= "a"{18446744073709551617}'), "RequestError"),
    Case("issue-4218", "#4218, #3980, #2971", "an ambiguous grammar: time without end", "grammar",
         _grammar('root ::= (a | a a)+ "!"\na ::= (b | b b)+\nb ::= (c | c c)+\nc ::= ([a-z] | [a-z] [a-z])+'), "ok"),
    Case("issue-19051", "#4492, #19051", "no grammar at all: it must not be left out silently", "grammar",
         _grammar("this is no grammar"), "RequestError", "expecting ::="),
    Case("issue-12597", "#12597, #13341, #13690, #15608, #27619, llama-cpp-python#1623",
         "a token that the grammar does not allow is accepted", "accept",
         _grammar('root ::= "a"'), "RequestError"),
    Case("grammar-empty", "#12597 (empty)", "a grammar that is finished, and the model goes on", "grammar",
         _grammar('root ::= ""'), "ok"),
    Case("issue-22234", "#22234", "a grammar that allows no token of the vocabulary", "grammar",
         _grammar('root ::= "\\U0010FFFF"'), "ok"),
    Case("grammar-unterminated", "ours", "an escape that is cut off", "grammar",
         _grammar('root ::= "\\u12'), "RequestError"),
    Case("grammar-class", "ours (class)", "a character class that is not closed", "grammar",
         _grammar("root ::= [a-"), "RequestError"),
    Case("grammar-brackets", "ours (a check of ours)", "200,000 brackets that are not closed", "grammar",
         _grammar("root ::= " + "[" * 200_000), "RequestError"),
    Case("grammar-token", "ours", "a token that does not exist", "grammar",
         _grammar("root ::= <[4294967295]>"), "RequestError"),
    Case("trigger-regex", "ours", "a trigger whose search takes exponential time", "trigger",
         lambda seeds: (seeds.model, b'root ::= "a"', b"^(a|a)*(a|a)*$(a+)+$"), "ok"),
)  # fmt: skip

TEMPLATES = (
    Case("cve-2024-34359", "CVE-2024-34359 (llama-cpp-python), SGLang CVE-2026-5760", "Python code through its objects",
         "template", _template(_PROBES), "RequestError"),
    Case("cve-2024-56326", "CVE-2019-10906, CVE-2024-56326, CVE-2024-56201, CVE-2025-27516",
         "ways out of Jinja2's sandbox", "template", _template(_FORMATS), "RequestError"),
    Case("llama-cpp-python-2225", "llama-cpp-python#2225", "a block that is not closed", "template",
         _template("{% for m in messages %}{{ m.content "), "RequestError", "Parser Error"),
    Case("issue-19085", "#19085 (still open)", "100,000 nested parentheses", "template",
         _template("{{ " + "(" * DEEP + "1" + ")" * DEEP + " }}"), "RequestError", "nest"),
    Case("issue-19085-not", "#19085 (unary)", "100,000 times not", "template",
         _template("{{ " + "not " * DEEP + "1 }}"), "RequestError", "characters"),
    Case("issue-19085-if", "#19085 (blocks)", "20,000 nested blocks", "template",
         _template("{% if 1 %}" * 20_000 + "{% endif %}" * 20_000), "RequestError", "characters"),
    Case("issue-26387", "#26387 (still open)", "a macro that calls itself", "template",
         _template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "RequestError", "too deep"),
    Case("issue-24140", "#24140 (still open)", "a range of 10^9 numbers", "template",
         _template("{% for i in range(1000000000) %}x{% endfor %}"), "OutOfMemoryError",
         memory_limit_bytes=32 << 20),
    Case("template-doubling", "ours", "a text that doubles 40 times", "template",
         _template("{% set ns = namespace(s='x') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"
                   "{{ ns.s }}"), "OutOfMemoryError", memory_limit_bytes=32 << 20),
    Case("template-loops", "vLLM CVE-2025-61620", "nested loops: time without end", "template",
         _template("{% for a in range(4000) %}{% for b in range(4000) %}{% for c in range(4000) %}{% endfor %}"
                   "{% endfor %}{% endfor %}x"), "DeadlineError", "chat template: it did not end", deadline_s=0.3),
    Case("template-raises", "ours", "it raises an error of 400 kB of terminal escapes", "template",
         _template("{{ raise_exception('\x1b[2J' * 100000) }}"), "RequestError"),
    Case("template-division", "ours", "a division by 0", "template",
         _template("{{ 1 // 0 }}{{ 1 % 0 }}"), "RequestError", "Unexpected token"),
    Case("template-index", "ours (indices)", "indices beyond 64 bits", "template",
         _template("{{ messages[9223372036854775807] }}{{ 'abc'[-9223372036854775808:] }}"
                   "{{ 99999999999999999999 }}"), "RequestError", "out of range"),
    Case("issue-27434", "#27434", "JSON nested 100,000 deep", "json",
         lambda seeds: (seeds.model, b"[" * DEEP + b"]" * DEEP), "RequestError", "recursion"),
)  # fmt: skip

CASES = (*GRAMMARS, *TEMPLATES)
