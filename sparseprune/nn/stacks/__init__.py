"""Stacks of layers as one native call, of encoders for sequences and of decoders for new tokens: recognised by
structure, proven by running both forms.
"""

from .choose import (
    ENGINES,
    StackChoice,
    decoder_linears,
    drop_stacks_,
    find_stacks,
    in_encoder,
    layered_prompts,
    leave_to_layers_,
    put_stacks_,
    stacks_in_use,
    use_stacks_,
    why_layers,
)
from .decoder_build import weights_in_turn
from .decoder_forward import DecoderForward
from .forward import StackForward, stack_of

__all__ = [
    "ENGINES",
    "DecoderForward",
    "StackChoice",
    "StackForward",
    "decoder_linears",
    "drop_stacks_",
    "find_stacks",
    "in_encoder",
    "layered_prompts",
    "leave_to_layers_",
    "put_stacks_",
    "stack_of",
    "stacks_in_use",
    "use_stacks_",
    "weights_in_turn",
    "why_layers",
]
