"""Units of recurrent layers."""

from keras import layers as K
from keras import ops, tree

from lipdp.local.unit import Unit, patched

__all__ = ["RecurrentUnit"]


class RecurrentUnit(Unit):
    """LSTM, GRU and SimpleRNN: all steps' products with the kernels, and one backward pass in time.

    What the kernel adds at all steps, `z_t = x_t @ kernel + bias`, is computed before the loop, and
    the loop runs on that. The gates are functions of `z_t + h_{t−1} @ recurrent_kernel`, so the
    cotangents `δ_t` of `z_t` are those of that sum. The gradient of kernel, recurrent kernel and
    bias is then that of one matrix: `Σ_t (x_t ‖ h_{t−1} ‖ 1) ⊗ δ_t`. At a step that is masked,
    `δ_t = 0`.

    A GRU's candidate reads the state through the gate r. With `reset_after` that is `r ∘ (h @ R +
    b)`, whose matrix gets the cotangent `r ∘ δ`; otherwise it is `(r ∘ h) @ R`.
    """

    @classmethod
    def fits(cls, layer):
        return type(layer) in (K.LSTM, K.GRU, K.SimpleRNN, K.RNN) and type(layer.cell) in _STEPS

    def entries(self, saved, g):
        if self.trains(self.layer.cell.kernel):
            return super().entries(saved, g)
        return 2 * super().entries(saved, g)

    def run(self, call, tap, args, kwargs):
        layer, cell = self.layer, self.layer.cell
        given = layer._call_signature.bind(*args, **kwargs).arguments
        x, mask = given["sequences"], given.get("mask")
        mask = mask[0] if isinstance(mask, (list, tuple)) else mask
        start = given.get("initial_state")
        if layer.go_backwards:
            x = ops.flip(x, axis=1)
            mask = None if mask is None else ops.flip(mask, axis=1)
        z = ops.matmul(x, cell.kernel)
        if cell.bias is not None:
            z = z + (cell.bias[0] if len(cell.bias.shape) == 2 else cell.bias)
        saved = [x, z]
        z = tap(z, saved)

        step = _STEPS[type(cell)]
        whole = {"return_sequences": True, "return_state": True, "zero_output_for_mask": False}
        with (
            patched(layer, go_backwards=False, use_cudnn=False, **whole),
            patched(cell, call=lambda z, states, training=False: step(cell, z, states)),
        ):
            outputs, *states = K.RNN.call(layer, z, initial_state=start, mask=mask)

        # What each step read: what the one before gave.
        first = tree.flatten(start)[0] if start is not None else ops.zeros_like(outputs[:, 0])
        first = ops.expand_dims(ops.cast(first, outputs.dtype), 1)
        before = ops.concatenate([first, outputs[:, :-1]], axis=1)
        if mask is not None:
            mask = ops.expand_dims(ops.cast(mask, "bool"), -1)
            if start is not None:  # outputs may be zeros until the first step that is not masked
                seen = ops.cumsum(ops.cast(mask, "int32"), axis=1) > 0
                seen = ops.concatenate([ops.zeros_like(seen[:, :1]), seen[:, :-1]], axis=1)
                before = ops.where(seen, before, first)
            if layer.zero_output_for_mask:
                outputs = ops.where(mask, outputs, ops.zeros_like(outputs))
        saved.append(before)
        outputs = outputs if layer.return_sequences else outputs[:, -1]
        return (outputs, *states) if layer.return_state else outputs

    def measure(self, saved, g, static=None):
        x, z, h = saved
        cell, u = self.layer.cell, self.layer.cell.units
        kernel, recurrent, bias = cell.kernel, cell.recurrent_kernel, cell.bias
        if type(cell) is not K.GRUCell:
            return self.joined(self.matrices([(kernel, x), (recurrent, h)], g, bias))
        found = self.matrices([(kernel, x)], g, bias)
        r = ops.matmul(h, recurrent[:, u : 2 * u]) + z[..., u : 2 * u]
        if cell.reset_after:
            r = r if bias is None else r + bias[1, u : 2 * u]
            through = cell.recurrent_activation(r) * g[..., 2 * u :]
            g = ops.concatenate([g[..., : 2 * u], through], axis=-1)
            return self.joined(found + self.matrices([(recurrent, h)], g, bias))
        found += self.matrices([(recurrent, h)], g[..., : 2 * u])
        h = cell.recurrent_activation(r) * h
        return self.joined(found + self.matrices([(recurrent, h)], g[..., 2 * u :]))


def _lstm(cell, z, states):
    h, c = states
    z = ops.split(z + ops.matmul(h, cell.recurrent_kernel), 4, axis=1)
    c, o = cell._compute_carry_and_output_fused(z, c)
    h = o * cell.activation(c)
    return h, [h, c]


def _gru(cell, z, states):
    h, u, recurrent = tree.flatten(states)[0], cell.units, cell.recurrent_kernel
    inner = ops.matmul(h, recurrent if cell.reset_after else recurrent[:, : 2 * u])
    if cell.reset_after and cell.bias is not None:
        inner = inner + cell.bias[1]
    update, r = (cell.recurrent_activation(z[:, i : i + u] + inner[:, i : i + u]) for i in (0, u))
    inner = r * inner[:, 2 * u :] if cell.reset_after else ops.matmul(r * h, recurrent[:, 2 * u :])
    h = update * h + (1 - update) * cell.activation(z[:, 2 * u :] + inner)
    return h, [h]


def _simple(cell, z, states):
    h = z + ops.matmul(tree.flatten(states)[0], cell.recurrent_kernel)
    h = h if cell.activation is None else cell.activation(h)
    return h, [h]


# Cells to a step that is given what the kernel adds.
_STEPS = {K.LSTMCell: _lstm, K.GRUCell: _gru, K.SimpleRNNCell: _simple}
