"""The clip ratios with which attention errs least."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from kvbits.calibration.attention import Observed
from kvbits.codecs import Codec, EncodeContext
from kvbits.layer_plan import SIDES, Side

RATIOS = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.88, 0.86)
NUM_QUERIES = 64  # of a document, at which errors are looked at

CodecOf = Callable[[int, Side, float], Codec]


class ClipSearch:
    """Squared errors of attention outputs of every layer, side and ratio, over documents.

    Only one side of one layer is encoded at a time.

    Args:
        codec_of: The codec of a layer and side under a ratio.
        sink_tokens: First tokens, which stay exact.

    Source: SKVQ (arXiv 2405.06219) section 3.2, which searches the ratio of every group.
    """

    def __init__(self, codec_of: CodecOf, sink_tokens: int) -> None:
        self._codec_of = codec_of
        self._sink_tokens = sink_tokens
        self._errors: dict[tuple[int, Side], Tensor] = defaultdict(
            lambda: torch.zeros(len(RATIOS), dtype=torch.float64)
        )

    def add(self, seen: Observed) -> None:
        """Count what one layer's attention over one document loses by each ratio.

        Raises:
            CalibrationError: If states or queries are not finite.
        """
        seen.check()
        exact = _output(seen, seen.key_states, seen.value_states)
        for side in SIDES:
            states = seen.key_states if side == "key" else seen.value_states
            errors = []
            for ratio in RATIOS:
                decoded = self._decoded(self._codec_of(seen.layer_idx, side, ratio), states)
                both = (
                    (decoded, seen.value_states) if side == "key" else (seen.key_states, decoded)
                )
                errors.append((_output(seen, *both) - exact).double().square().sum())
            self._errors[seen.layer_idx, side] += torch.stack(errors).cpu()

    def best(self) -> dict[tuple[int, Side], float]:
        """The ratio of least error of every layer and side that was seen."""
        return {place: RATIOS[int(errors.argmin())] for place, errors in self._errors.items()}

    def _decoded(self, codec: Codec, states: Tensor) -> Tensor:
        sinks, packed = states[:, : self._sink_tokens], states[None, :, self._sink_tokens :]
        positions = torch.arange(self._sink_tokens, states.shape[1], device=states.device)
        context = EncodeContext(positions[None])
        decoded = codec.decode(codec.encode(packed, context), context)[0]
        return torch.cat((sinks, decoded.to(states.dtype)), 1)


def _output(seen: Observed, key_states: Tensor, value_states: Tensor) -> Tensor:
    """Attention output ``[H_q, Q, D_v]`` over the given states, float32."""
    repeats = len(seen.query) // len(value_states)
    return seen.weights(key_states) @ value_states.float().repeat_interleave(repeats, 0)
