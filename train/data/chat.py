"""The chat template of an export: Jinja that renders, for any of our templates, what `Encoder` encodes piece by piece.

One Jinja text serves all; a template's constants are set at its head, so that the exported file is self-contained.
A language model's own template usually reads only text: a prelude before it turns each message into one text, with the
image token in place of an image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from train.data.encoder import Encoder
from train.data.own_template import OwnTemplate
from train.data.prompts import Template, Turn

OWN_FOLLOWS = "{#- What follows is the language model's own template. #}\n"
_MACROS = """\
{%- macro images(content) -%}
{%- if content is not string %}{% for part in content if part['type'] == 'image' %}{{ IMAGE }}{% endfor %}{% endif -%}
{%- endmacro -%}
{%- macro words(content) -%}
{%- if content is string %}{{ content | trim }}{% else -%}
{%- for part in content if part['type'] == 'text' and part['text'] | trim -%}
{{ '' if loop.first else '\\n' }}{{ part['text'] | trim }}
{%- endfor %}{% endif -%}
{%- endmacro -%}
{%- macro both(content) -%}
{%- if content is string %}{{ content | trim }}{% else -%}
{%- for part in content if part['type'] == 'image' or part['text'] | trim -%}
{{ '' if loop.first else '\\n' }}{{ IMAGE if part['type'] == 'image' else part['text'] | trim }}
{%- endfor %}{% endif -%}
{%- endmacro -%}
"""
_OWN = """\
{%- if enable_thinking is not defined %}{% set enable_thinking = THINKS %}{% endif -%}
{%- set state = namespace(folded='', messages=[]) -%}
{%- for message in messages -%}
{%- set said = both(message['content'] or '') -%}
{%- if FOLD and message['role'] == 'system' -%}
{%- set state.folded = said -%}
{%- else -%}
{%- if state.folded and message['role'] == 'user' -%}
{%- set said = state.folded + ('\\n' if said else '') + said -%}
{%- set state.folded = '' -%}
{%- endif -%}
{%- set state.messages = state.messages + [dict(message, content=said)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = state.messages -%}
{{- BOS -}}
"""
_JINJA = """\
{%- set state = namespace(folded='', prefix=ASSISTANT, system=SYSTEM) -%}
{%- if messages and messages[0]['role'] == 'system' and words(messages[0]['content']) -%}
{%- set state.system = words(messages[0]['content']) -%}
{%- endif -%}
{{ BOS }}
{%- if FOLD -%}{%- set state.folded = state.system -%}
{%- elif QUESTION != 'dropped' and state.system -%}{{ state.system + SYSTEM_END }}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{%- if QUESTION == 'inline' -%}
{%- set said = both(message['content']) -%}
{{ START_USER + USER + LEAD + state.folded + ('\\n' if state.folded and said else '') + said }}
{{- END_USER + AFTER_END if END_USER else '' -}}
{%- else -%}
{{ images(message['content']) }}
{%- if QUESTION == 'after_images' -%}
{%- set said = words(message['content']) -%}
{%- set said = state.folded + ('\\n' if state.folded and said else '') + said -%}
{%- set state.prefix = ASSISTANT if said else BARE -%}
{{ USER + LEAD + said if said else '' }}
{%- endif -%}
{%- endif -%}
{%- set state.folded = '' -%}
{%- elif message['role'] == 'assistant' -%}
{%- set said = words(message['content']) -%}
{{ START_ASSISTANT + state.prefix + (LEAD if said or LEAD == '\\n' else '') + said + END + AFTER_END }}
{%- endif -%}
{%- endfor -%}
{{ START_ASSISTANT + state.prefix + (LEAD if LEAD == '\\n' else '') if add_generation_prompt else '' }}"""


def chat_template(encoder: Encoder) -> str:
    """Return the Jinja template that renders what `encoder` encodes."""
    template, tokenizer = encoder.template, encoder.tokenizer
    if isinstance(template, OwnTemplate):
        return _wrap(template, encoder)
    assert isinstance(template, Template)
    bare = template.assistant if template.bare_assistant is None else template.bare_assistant
    constants: dict[str, str] = {
        "IMAGE": encoder.image_token,
        "BOS": "".join(tokenizer.convert_ids_to_tokens(encoder.bos_ids)),
        "SYSTEM": template.system,
        "SYSTEM_END": template.system_end,
        "START_USER": template.start_user,
        "USER": template.user,
        "LEAD": template.lead,
        "END_USER": template.end_user,
        "START_ASSISTANT": template.start_assistant,
        "ASSISTANT": template.assistant,
        "BARE": bare,
        "END": template.end_text or encoder.end_token,
        "AFTER_END": template.after_end,
        "QUESTION": template.question,
    }
    settings = _settings(constants) + f"{{%- set FOLD = {str(template.fold_system).lower()} -%}}\n"
    return settings + _MACROS + _JINJA


def _wrap(template: OwnTemplate, encoder: Encoder) -> str:
    tokenizer = encoder.tokenizer
    constants = {"IMAGE": encoder.image_token, "BOS": "".join(tokenizer.convert_ids_to_tokens(encoder.bos_ids))}
    # The export's eos token is the one that ends answers; in this template the names keep their original meaning.
    constants |= {name: token for name, token in template.tokens.items() if re.search(rf"\b{name}\b", template.source)}
    flags = {"FOLD": template.folds_system, "THINKS": template.thinks}
    switches = "".join(f"{{%- set {name} = {str(value).lower()} -%}}\n" for name, value in flags.items())
    return _settings(constants) + switches + _MACROS + _OWN + OWN_FOLLOWS + template.source


def own_source(text: str) -> str:
    """Return the language model's own template in the chat template of an export, else the whole."""
    return text.partition(OWN_FOLLOWS)[2] or text


def _settings(constants: dict[str, str]) -> str:
    return "".join(f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in constants.items())


def to_messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Write turns as the messages that `apply_chat_template` takes."""
    return [
        {
            "role": turn.role,
            "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in turn.parts],
        }
        for turn in turns
    ]
