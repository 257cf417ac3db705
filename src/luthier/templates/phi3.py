"""Define Phi-3's chat format: ``<|user|>\\nq<|end|>\\n<|assistant|>\\na<|end|>\\n``, in its three published versions.

2024-07 ("3.1", Phi-3.5): a system role and no BOS; its jinja template writes ``<|endoftext|>`` after the last reply,
which is no stop token and is not trained. 2024-04 (mini): BOS and no system role. 2024-05 (medium): neither.
Source: the chat_template of each revision, as contained in the tests of llama.cpp and xinference.
"""

from __future__ import annotations

from dataclasses import replace

from luthier.templates.turns import Turns

_MARKERS = ("<|user|>", "<|assistant|>", "<|end|>")
_PLAIN = Turns(
    name="phi3",
    user=("<|user|>\n", "<|end|>\n"),
    reply="<|assistant|>\n",
    stop=("<|end|>",),
    gap="\n",
    markers=_MARKERS,
)

FORMS = (
    replace(_PLAIN, system=("<|system|>\n", "<|end|>\n"), markers=(*_MARKERS, "<|system|>")),
    replace(_PLAIN, opening="<s>", markers=(*_MARKERS, "<s>")),
    _PLAIN,
)
ENDING = "<|end|>\n<|endoftext|>"  # of a conversation, in the published jinja template
