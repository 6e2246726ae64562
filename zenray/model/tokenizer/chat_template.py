"""The one chat template of the family, for transformers and vLLM: turns, tools, their calls and results, reasoning.

Turns are ChatML's. Tool calls are JSON between <tool_call> tags, as vLLM's `hermes` parser reads them; reasoning stands
between <think> tags, as its `qwen3` parser does. Past reasoning is left out once the user has spoken again. With
`enable_thinking=false` the answer begins with an empty reasoning block. What the assistant says is marked as
`generation`, so that training can mask the rest (`return_assistant_tokens_mask`).
"""

CHAT_TEMPLATE = r"""
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content -%}
            {%- if part.type == 'text' -%}
                {{- part.text -}}
            {%- elif part.type in ('image', 'image_url', 'input_image') -%}
                {{- '<image>' -}}
            {%- elif part.type in ('audio', 'audio_url', 'input_audio') -%}
                {{- '<audio>' -}}
            {%- elif part.type in ('video', 'video_url', 'input_video') -%}
                {{- '<video>' -}}
            {%- else -%}
                {{- raise_exception('A content part of type ' ~ part.type ~ ' is not known.') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set found = namespace(last_question=-1, first=0) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- set found.last_question = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- set opening = '' -%}
{%- if messages and messages[0].role in ('system', 'developer') -%}
    {%- set opening = text_of(messages[0].content) -%}
    {%- set found.first = 1 -%}
{%- endif -%}
{%- if opening or tools -%}
    {{- '<|im_start|>system\n' ~ opening -}}
    {%- if tools -%}
        {{- '\n\n' if opening else '' -}}
        {{- 'You may call these functions:\n<tools>' -}}
        {%- for tool in tools -%}
            {{- '\n' -}}
            {{- (tool.function if tool.function is defined else tool) | tojson -}}
        {%- endfor -%}
        {{- '\n</tools>\nTo call one, write its name and arguments as JSON:\n' -}}
        {{- '<tool_call>\n{"name": "the_name", "arguments": {"the_argument": "its value"}}\n</tool_call>' -}}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if loop.index0 < found.first -%}
    {%- elif message.role in ('system', 'developer') -%}
        {{- '<|im_start|>system\n' ~ text_of(message.content) ~ '<|im_end|>\n' -}}
    {%- elif message.role == 'user' -%}
        {{- '<|im_start|>user\n' ~ text_of(message.content) ~ '<|im_end|>\n' -}}
    {%- elif message.role == 'tool' -%}
        {{- '<|im_start|>tool\n<tool_response>\n' ~ text_of(message.content) ~ '\n</tool_response><|im_end|>\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\n' -}}
        {%- set said = text_of(message.content) -%}
        {%- set thought = message.reasoning or message.reasoning_content or '' -%}
        {%- set calls = message.tool_calls or [] -%}
        {%- set shown = thought if loop.index0 > found.last_question else '' -%}
        {%- generation -%}
            {%- if shown -%}
                {{- '<think>\n' ~ shown ~ '\n</think>\n\n' -}}
            {%- endif -%}
            {{- said -}}
            {%- for call in calls -%}
                {%- set function = call.function if call.function is defined else call -%}
                {{- '\n' if said or not loop.first else '' -}}
                {{- '<tool_call>\n{"name": ' ~ (function.name | tojson) ~ ', "arguments": ' -}}
                {%- if function.arguments is string -%}
                    {{- function.arguments or '{}' -}}
                {%- else -%}
                    {{- (function.arguments or {}) | tojson -}}
                {%- endif -%}
                {{- '}\n</tool_call>' -}}
            {%- endfor -%}
            {{- '<|im_end|>' -}}
        {%- endgeneration -%}
        {{- '\n' -}}
    {%- else -%}
        {{- raise_exception('A message of role ' ~ message.role ~ ' is not known.') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}
        {{- '<think>\n\n</think>\n\n' -}}
    {%- endif -%}
{%- endif -%}
""".strip()
