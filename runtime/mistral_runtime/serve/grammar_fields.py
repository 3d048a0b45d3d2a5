"""What an answer has to look like, in OpenAI's words (`response_format`) or in vLLM's (`structured_outputs`)."""

from __future__ import annotations

import json
from typing import Any

from mistral_runtime.serve.api_error import bad_request
from mistral_runtime.serve.fields import Fields
from mistral_runtime.serve.protocol import Grammar, GrammarKind

MAX_GRAMMAR_CHARACTERS = 256 << 10
MAX_ALTERNATIVES = 1000
_GUIDED: dict[str, GrammarKind] = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "lark"}


def read_grammar(fields: Fields) -> Grammar | None:
    """Return the one grammar that is asked for, None where none is.

    Raises:
        ApiError: Two of them, or one that cannot be right. Whether a grammar compiles, the engine finds out.
    """
    found = [_response_format(fields), *(_guided(fields, f"guided_{name}", kind) for name, kind in _GUIDED.items())]
    structured = fields.child("structured_outputs")
    if structured is not None:
        found += [_guided(structured, name, kind) for name, kind in _GUIDED.items()]
        if structured.boolean("json_object"):
            found.append(Grammar("json_object", ""))
        structured.done()
    grammars = [grammar for grammar in found if grammar is not None]
    if len(grammars) > 1:
        raise bad_request("expected one of response_format, structured_outputs and guided_…, found several")
    return grammars[0] if grammars else None


def schema_grammar(schema: Any) -> Grammar:
    """Return the grammar of the JSON values that a schema allows."""
    return Grammar("json_schema", json.dumps(schema, ensure_ascii=False))


def _response_format(fields: Fields) -> Grammar | None:
    wanted = fields.child("response_format")
    if wanted is None:
        return None
    kind = wanted.choice("type", "", ("text", "json_object", "json_schema"))
    grammar = None
    if kind == "json_object":
        grammar = Grammar("json_object", "")
    elif kind == "json_schema":
        grammar = _named_schema(wanted)
    wanted.done()
    return grammar


def _named_schema(wanted: Fields) -> Grammar:
    named = wanted.child("json_schema")
    if named is None:
        raise wanted.wrong("json_schema", "an object with name and schema")
    named.required_text("name")
    named.text("description", None)
    named.boolean("strict")  # the answer is held to the schema either way
    schema = named.raw("schema")
    if not isinstance(schema, dict):
        raise named.wrong("schema", "a JSON schema")
    named.done()
    return _bounded(named, "schema", schema_grammar(schema))


def _guided(fields: Fields, name: str, kind: GrammarKind) -> Grammar | None:
    value = fields.raw(name)
    if value is None:
        return None
    if kind == "choice":
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_ALTERNATIVES or not all(map(_is_text, value)):
            raise fields.wrong(name, f"an array of 1 to {MAX_ALTERNATIVES} strings")
        return _bounded(fields, name, Grammar(kind, json.dumps(value, ensure_ascii=False)))
    if kind == "json_schema" and isinstance(value, dict):
        return _bounded(fields, name, schema_grammar(value))
    if not _is_text(value):
        raise fields.wrong(name, "a JSON schema" if kind == "json_schema" else "a string")
    if kind == "json_schema":
        value = _schema_text(fields, name, value)
    return _bounded(fields, name, Grammar(kind, value))


def _schema_text(fields: Fields, name: str, text: str) -> str:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise fields.wrong(name, "a JSON schema") from error
    if not isinstance(schema, dict):
        raise fields.wrong(name, "a JSON schema")
    return text


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _bounded(fields: Fields, name: str, grammar: Grammar) -> Grammar:
    if len(grammar.text) > MAX_GRAMMAR_CHARACTERS:
        raise bad_request(f"{name}: expected at most {MAX_GRAMMAR_CHARACTERS} characters, found {len(grammar.text)}")
    return grammar
