"""Chat templates against transformers' `apply_chat_template`, and what must be refused."""

import pytest

from jaxserve.chat import MAX_CHARS, ChatTemplate, read_chat_template
from jaxserve.chat import render_chat as render
from jaxserve.text import load_tokenizer

USER = {"role": "user", "content": "Hi, how are you?"}
CONVERSATIONS = [
    [USER],
    [{"role": "system", "content": "Be <brief> & 'nice'."}, USER],
    [USER, {"role": "assistant", "content": "Fine.\n"}, {"role": "user", "content": "  And\n\nnow? 你好"}],
]
EACH = "{% for m in messages %}"
LOOP = "{% for m in messages %}\n    {{ m['role'] }}: {{ m.content | trim }}\n{% endfor %}\n"
TEMPLATES = {
    "blocks": LOOP + "{% if add_generation_prompt %}\nassistant:\n{%- endif %}",
    "tokens": "{{ bos_token }}" + LOOP + "{{ eos_token }}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ tools | tojson }}",
    "tools": "{% if tools %}{% for t in tools %}{{ t.function.name }},{% endfor %}{% endif %}" + LOOP,
    "controls": EACH + "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}|{% endfor %}",
    "generation": EACH + "{% generation %}{% set x = 1 %}{{ m.content }}{% endgeneration %};{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "macro": "{% macro show(m) %}[{{ m.role }}]{{ m.content }}{% endmacro %}" + EACH + "{{ show(m) }}{% endfor %}",
    "variable": "{{ enable_thinking | default('unset') }}{{ messages | length }}{{ documents }}",
    "methods": "{{ messages[-1]['content'].strip().split(' ')[0] }}{{ '%s!' % messages[0].role }}",
    "operators": "{{ 'ab' * 3 }}{{ 2 ** 5 }}{{ [1] * 2 }}{{ 7 // 2 }}",
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "é", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_smollm2_equals_transformers(smollm, messages, add_generation_prompt):
    expected = smollm.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert smollm.render_chat(messages, add_generation_prompt=add_generation_prompt) == expected


@pytest.mark.parametrize("variables", [{}, {"tools": TOOLS}, {"enable_thinking": False}])
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_equal_transformers(smollm, name, variables):
    for messages in CONVERSATIONS:
        expected = smollm.hf.apply_chat_template(
            messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True, **variables
        )
        assert smollm.render_chat(messages, chat_template=TEMPLATES[name], **variables) == expected


@pytest.mark.parametrize("content", ["The answer", "The answer ", "spaces \n ", [{"type": "text", "text": "Part"}]])
@pytest.mark.parametrize("template", [None, TEMPLATES["blocks"], TEMPLATES["macro"]])
def test_continue_final_message_equals_transformers(smollm, content, template):
    text = content if isinstance(content, str) else content[0]["text"]
    rendered = smollm.render_chat(
        [USER, {"role": "assistant", "content": content}],
        chat_template=template,
        add_generation_prompt=False,
        continue_final_message=True,
    )
    expected = smollm.hf.apply_chat_template(
        [USER, {"role": "assistant", "content": text}],
        chat_template=template,
        tokenize=False,
        continue_final_message=True,
    )
    assert rendered == expected
    assert rendered.rstrip().endswith(text.strip())


def test_parts_reach_the_template_in_the_form_it_wants(smollm):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}]
    joined = [{"role": "user", "content": "one two"}]
    assert smollm.render_chat(messages) == smollm.render_chat(joined)
    only_parts = "{% for m in messages %}{% for p in m['content'] %}[{{ p['text'] }}]{% endfor %}{% endfor %}"
    assert smollm.render_chat(messages, chat_template=only_parts) == "[one ][two]"
    assert smollm.render_chat(joined, chat_template=only_parts) == "[one two]"
    both = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}"
        "{% else %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}{% endfor %}"
    )
    assert smollm.render_chat(messages, chat_template=both) == "[one ][two]"
    assert smollm.render_chat(joined, chat_template=both) == "one two"


def test_tool_call_arguments_are_parsed(smollm):
    template = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments.city }}{% endfor %}{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Berlin"}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert smollm.render_chat([message], chat_template=template) == "Berlin"
    assert call["function"]["arguments"] == '{"city": "Berlin"}'
    call["function"]["arguments"] = "{"
    with pytest.raises(ValueError, match=r"messages\[1\]: the arguments of tool_calls\[0\] are not valid JSON"):
        smollm.render_chat([USER, message], chat_template=template)


@pytest.mark.parametrize(
    ("messages", "kind", "match"),
    [
        ("hello", TypeError, "messages must be a list of mappings"),
        ({"role": "user"}, TypeError, "messages must be a list of mappings"),
        ([], ValueError, "messages is empty"),
        ([USER, "x"], TypeError, r"messages\[1\] must be a mapping"),
        ([USER, {"content": "x"}], ValueError, r"messages\[1\] has no role"),
        ([{"role": 3, "content": "x"}], TypeError, r"messages\[0\]: role must be a string, not int"),
        ([USER, USER, {"role": "user"}], ValueError, r"messages\[2\] has no content"),
        ([{"role": "user", "content": 3}], TypeError, r"messages\[0\]: content must be a string or a list"),
        ([{"role": "user", "content": ["x"]}], TypeError, r"messages\[0\]: content\[0\] must be a mapping"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], ValueError, r"content\[0\] has type 'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], TypeError, r"content\[0\] must have a string"),
        ([{"role": "assistant", "tool_calls": ["x"]}], TypeError, r"tool_calls\[0\] must be a mapping"),
    ],
)
def test_bad_messages_name_the_index(messages, kind, match):
    with pytest.raises(kind, match=match):
        render(ChatTemplate(LOOP, {}), messages)


def test_two_ways_to_end_the_prompt(smollm):
    with pytest.raises(ValueError, match=r"continue_final_message .* add_generation_prompt"):
        smollm.render_chat([USER], continue_final_message=True)
    with pytest.raises(ValueError, match=r"messages\[0\] has none"):
        smollm.render_chat([{**USER, "content": ""}], continue_final_message=True, add_generation_prompt=False)
    with pytest.raises(ValueError, match="drops or changes"):
        smollm.render_chat([USER], chat_template="{{ 1 }}", continue_final_message=True, add_generation_prompt=False)
    with pytest.raises(TypeError, match=r"tools\[0\] must be a JSON schema"):
        smollm.render_chat([USER], tools=["weather"])


def test_no_template_and_named_templates(make, tmp_path, words, byte_level):
    with pytest.raises(ValueError, match=r"no default chat template \(none\): give chat_template="):
        words.render_chat([USER])
    named = [
        {"name": "default", "template": "D{{ messages[0].content }}"},
        {"name": "tool_use", "template": "T{{ tools }}"},
    ]
    tokenizer = load_tokenizer(make.save_folder(tmp_path, byte_level.backend, chat_template=named))
    assert tokenizer.render_chat([USER]) == "D" + USER["content"]
    assert tokenizer.render_chat([USER], tools=TOOLS).startswith("T[")
    assert tokenizer.render_chat([USER], chat_template="tool_use") == "TNone"
    path = tmp_path / "own.jinja"
    path.write_text("own {{ messages[0].content }}", encoding="utf-8")
    assert words.render_chat([USER], chat_template=str(path)) == "own " + USER["content"]
    assert words.render_chat([USER], chat_template=path) == "own " + USER["content"]
    assert read_chat_template("{{ x }}") == "{{ x }}"
    with pytest.raises(ValueError, match="neither a file nor a Jinja template"):
        words.render_chat([USER], chat_template="missing.jinja")


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].missing.attribute }}", "has no attribute 'missing'"),
        ("{% for i in range(10 ** 6) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}", "longer than"),
        ("{{ 'x' * (10 ** 12) }}", "repeats a value"),
        ("{{ (10 ** 9) * 'x' }}", "repeats a value"),
        ("{{ 9 ** 9 ** 9 }}", "too large a power"),
        ("{{ 1 // 0 }}", "division"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_bad_template_is_one_clear_error(template, match):
    with pytest.raises(ValueError, match=match) as error:
        render(ChatTemplate(template, {}), [USER])
    assert str(error.value).startswith("the chat template failed on these messages")


def test_template_syntax():
    with pytest.raises(ValueError, match="not valid Jinja, line 2"):
        ChatTemplate("{% if x %}\n{% oops %}", {})
    assert MAX_CHARS >= 1 << 20
    assert len(render(ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", {}), [USER])) == 10


def test_gguf_with_several_templates(make, tmp_path):
    from jaxserve.tokenizers_gguf import _chat_templates

    tokenizer = load_tokenizer(make.write_gguf(tmp_path / "t.gguf", make.spm_values()))
    assert isinstance(tokenizer.chat_template, str)
    metadata = {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b"}
    assert _chat_templates(metadata) == {"default": "a", "tool_use": "b"}
    assert _chat_templates({}) is None
