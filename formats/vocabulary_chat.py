"""The chat formats of Llama 2 and 3 as Jinja templates, for programs that take the format from the tokenizer's files.

They give what Meta's code gives: each turn of Llama 2 begins with the token for the beginning of a text, and a system
prompt stands in the first turn. llama.cpp recognizes some formats by words of the template; `bos_token + '[INST]` is
one of them.
"""

from __future__ import annotations

_LLAMA_2_ROLES = "after an optional system message the roles alternate user, assistant, user, ..."

LLAMA_2_TEMPLATE = (
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% set turns = messages[1:] %}"
    "{% else %}"
    "{% set system = '' %}"
    "{% set turns = messages %}"
    "{% endif %}"
    "{% for message in turns %}"
    "{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
    "{{ raise_exception('" + _LLAMA_2_ROLES + "') }}"
    "{% endif %}"
    "{% set content = (system if loop.first else '') + message['content'] %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (content | trim) + ' [/INST]' }}"
    "{% else %}"
    "{{ ' ' + (content | trim) + ' ' + eos_token }}"
    "{% endif %}"
    "{% endfor %}"
)

LLAMA_3_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + (message['content'] | trim) }}"
    "{{ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)
