"""What requests may not say."""

import pytest

from jaxserve.checks import ParameterError
from jaxserve.server.protocol import ChatCompletionRequest, TokenizeRequest, check_unicode

MESSAGES = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("kind", [ChatCompletionRequest, TokenizeRequest])
@pytest.mark.parametrize("name", ["chat_template", "messages", "tools", "continue_final_message"])
def test_template_variables_choose_no_template_and_no_file(kind: type, name: str):
    good = kind(messages=MESSAGES, chat_template_kwargs={"enable_thinking": False})
    assert good.template_options()["enable_thinking"] is False
    bad = kind(messages=MESSAGES, chat_template_kwargs={name: "/etc/hostname"})
    with pytest.raises(ParameterError, match=name):
        bad.template_options()


def test_halves_of_surrogate_pairs_are_refused():
    check_unicode({"prompt": ["\U0001f642"]})
    with pytest.raises(ParameterError, match="surrogate"):
        check_unicode({"prompt": ["x\ud800"]})
