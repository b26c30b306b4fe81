"""Chat templates: messages to prompt text, by Jinja templates in a sandbox.

The template language is that of Hugging Face's `apply_chat_template` (its "Chat templates" guide): `messages`, `tools`,
`documents`, `add_generation_prompt` and the special tokens are variables; `raise_exception` and `strftime_now` are
functions; `tojson` does not escape HTML; `{% generation %}` marks what the assistant wrote.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARS = 1 << 24  # of one rendered conversation, and of one value that a template makes by repetition
_PROBE = "jaxserveprobe"
_CONTINUE = "jaxserveContinuesHere "  # the space at its end tells whether the template trims the message


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: its contents, unchanged."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also refuses to build huge values by repetition or by powers."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            small = isinstance(left, int | float) and isinstance(right, int | float) and abs(right) <= 1024
            if not small or abs(left) > MAX_CHARS:
                raise ValueError("the template computes too large a power")
        else:
            for text, count in ((left, right), (right, left)):
                if isinstance(text, str | list | tuple) and isinstance(count, int) and len(text) * count > MAX_CHARS:
                    raise ValueError(f"the template repeats a value to more than {MAX_CHARS} characters")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled chat template and the special tokens it may name.

    Raises ValueError for text that is no valid Jinja template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any]):
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid Jinja, line {error.lineno}: {error.message}") from error
        self.special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text of `messages`; ValueError with the cause when the template fails or its text is too long."""
        variables = {"tools": None, "documents": None, **self.special_tokens, **variables, "messages": messages}
        pieces, size = [], 0
        try:
            for piece in self._template.generate(**variables):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_CHARS:
                    raise ValueError(f"its text is longer than {MAX_CHARS} characters")
        except Exception as error:  # whatever a template does wrong is the fault of this one request
            raise ValueError(f"the chat template failed on these messages: {error or type(error).__name__}") from error
        return "".join(pieces)

    @cached_property
    def accepts_text(self) -> bool:
        """Whether message contents may be strings; assumed where a trial cannot tell."""
        return self._shows(_PROBE) is not False

    @cached_property
    def accepts_parts(self) -> bool:
        """Whether message contents may be lists of parts, found by trial."""
        return self._shows([{"type": "text", "text": _PROBE}]) is True

    def _shows(self, content: str | list[dict[str, str]]) -> bool | None:
        """Whether the text of a message shows in the prompt as itself; None when the template refuses the trial."""
        try:
            text = self.render([{"role": "user", "content": content}], add_generation_prompt=True)
        except ValueError:
            return None
        return _PROBE in text and "'type'" not in text and '"type"' not in text


def read_chat_template(value: str | Path) -> str:
    """Template text from a file path or, when it holds a brace, from the text itself.

    Raises ValueError when it is neither.
    """
    if isinstance(value, str) and "{" in value:
        return value
    path = Path(value)
    if not path.is_file():
        raise ValueError(f"chat_template {str(value)[:200]!r} is neither a file nor a Jinja template (it has no '{{')")
    return path.read_text(encoding="utf-8")


def render_chat(
    template: ChatTemplate,
    messages: Any,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Any = None,
    **variables: Any,
) -> str:
    """The prompt text of one conversation.

    Contents are strings or lists of `{"type": "text", "text": ...}` parts; they reach the template in the form that
    the caller gave unless a trial shows that it wants the other one (parts are concatenated without a separator).
    Arguments of tool calls given as JSON text are parsed, since templates want mappings.

    Args:
        messages: a list of mappings with `role` and `content`, checked here.
        add_generation_prompt: end with the header of an assistant message.
        continue_final_message: leave the last message open, so that the model goes on with it.
        tools: a list of JSON schemas of the functions that the model may call.
        variables: further variables of the template.

    Raises:
        ValueError: a message without role or content, a part that is no text, both ways to end the prompt, or a
            template that fails. The index of the message is named.
        TypeError: a value of the wrong type.
    """
    if continue_final_message and add_generation_prompt:
        raise ValueError(
            "continue_final_message leaves the last message open and add_generation_prompt opens a new one: "
            "set one of them to False"
        )
    if tools is not None:
        _check_tools(tools)
    checked = [_normalise(message, f"messages[{i}]", template) for i, message in enumerate(_as_list(messages))]
    variables = {"tools": tools, "add_generation_prompt": add_generation_prompt, **variables}
    if not continue_final_message:
        return template.render(checked, **variables)
    return _render_open(template, checked, variables)


def _render_open(template: ChatTemplate, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
    """Render with a mark behind the last message's text and cut there."""
    content = messages[-1].get("content")
    if not content:
        raise ValueError(f"continue_final_message needs a text to continue, but messages[{len(messages) - 1}] has none")
    if isinstance(content, str):
        text, marked = content, content + _CONTINUE
    else:
        text = content[-1]["text"]
        marked = [*content[:-1], {**content[-1], "text": text + _CONTINUE}]
    rendered = template.render([*messages[:-1], {**messages[-1], "content": marked}], **variables)
    cut = rendered.rfind(_CONTINUE.rstrip())
    if cut < 0 or text.strip() not in rendered:
        raise ValueError("continue_final_message: the chat template drops or changes the text of the last message")
    kept = rendered[:cut]
    return kept if rendered.startswith(_CONTINUE, cut) else kept.rstrip()


def _as_list(messages: Any) -> Sequence[Any]:
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise TypeError(f"messages must be a list of mappings with role and content, not {type(messages).__name__}")
    if not messages:
        raise ValueError("messages is empty: give at least one message")
    return messages


def _check_tools(tools: Any) -> None:
    if isinstance(tools, str | bytes) or not isinstance(tools, Sequence):
        raise TypeError(f"tools must be a list of JSON schemas, not {type(tools).__name__}")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise TypeError(f"tools[{i}] must be a JSON schema (a mapping), not {type(tool).__name__}")


def _normalise(message: Any, where: str, template: ChatTemplate) -> dict[str, Any]:
    """A checked copy of one message, its content in the form that the template wants."""
    if not isinstance(message, Mapping):
        raise TypeError(f"{where} must be a mapping with role and content, not {type(message).__name__}")
    if "role" not in message:
        raise ValueError(f"{where} has no role; give one, such as 'user'")
    if not isinstance(message["role"], str):
        raise TypeError(f"{where}: role must be a string, not {type(message['role']).__name__}")
    result = dict(message)
    calls, content = message.get("tool_calls"), message.get("content")
    if calls:
        result["tool_calls"] = _tool_calls(calls, where)
    if content is None and message["role"] == "assistant" and "content" in message and not calls:
        content = result["content"] = ""  # as clients send back an answer that was empty
    if content is None:
        if not calls:
            raise ValueError(f"{where} has no content; give a string or a list of text parts")
    elif isinstance(content, str):
        if not template.accepts_text and template.accepts_parts:
            result["content"] = [{"type": "text", "text": content}]
    else:
        parts = _text_parts(content, where)
        result["content"] = parts if template.accepts_parts else "".join(part["text"] for part in parts)
    return result


def _text_parts(content: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(content, list | tuple):
        raise TypeError(f"{where}: content must be a string or a list of parts, not {type(content).__name__}")
    for j, part in enumerate(content):
        if not isinstance(part, Mapping):
            raise TypeError(f"{where}: content[{j}] must be a mapping with a type, not {type(part).__name__}")
        if part.get("type") != "text":
            raise ValueError(f"{where}: content[{j}] has type {part.get('type')!r}; only 'text' is supported")
        if not isinstance(part.get("text"), str):
            raise TypeError(f"{where}: content[{j}] must have a string as its text")
    return [dict(part) for part in content]


def _tool_calls(calls: Any, where: str) -> list[Any]:
    if not isinstance(calls, list | tuple):
        raise TypeError(f"{where}: tool_calls must be a list, not {type(calls).__name__}")
    result = []
    for j, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise TypeError(f"{where}: tool_calls[{j}] must be a mapping with a function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments else {}
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: the arguments of tool_calls[{j}] are not valid JSON: {error}") from error
        result.append({**call, "function": {**function, "arguments": arguments}})
    return result
