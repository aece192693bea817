"""The chat template of an export: Jinja that renders, for any of our templates, what `Encoder` encodes piece by piece.

One Jinja text serves all; a template's constants are set at its head, so that the exported file can be read by itself.
"""

from __future__ import annotations

import json

from train.data.prompts import Encoder

_JINJA = """\
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
    settings = "".join(f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in constants.items())
    return settings + f"{{%- set FOLD = {str(template.fold_system).lower()} -%}}\n" + _JINJA
