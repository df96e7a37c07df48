"""RNN, LSTM and GRU: unrolled once more, their parameters act through linear maps of every time step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from nbdyn.recorder.capture.calls import CannotSplit, ModuleCall, Stored
from nbdyn.recorder.capture.local import exact
from nbdyn.recorder.capture.unrolled import Batch, Layer, Unrolled, gradients


class Recurrent(Unrolled):
    """Handler of nn.RNN, nn.LSTM and nn.GRU, padded, packed or of one sequence without a batch dimension.

    A sample may have several sequences, which then stand together. Dropout between layers is repeated on the CPU.
    """

    def __init__(self, name: str, module: nn.RNNBase, firsts: dict[int, int]) -> None:
        super().__init__(name, module, firsts, module.mode.split("_")[0])
        self._rnn = module
        self._width = getattr(module, "proj_size", 0) or module.hidden_size  # of the hidden state

    def __call__(self, call: ModuleCall) -> list[Stored]:
        """One or two sites per layer and direction and one for its projection.

        Raises:
            CannotSplit: if the sequences are no multiple of the samples, or dropout cannot be repeated.
        """
        grads = call.grads if self._kind == "LSTM" else [*call.grads, None]
        if all(grad is None for grad in grads):
            return []
        self.refuse_others()
        x = call.args[0] if call.args else call.kwargs["input"]
        hx = call.args[1] if len(call.args) > 1 else call.kwargs.get("hx")
        flat = isinstance(x, Tensor) and x.ndim == 2
        some = next(grad for grad in grads if grad is not None)
        with torch.enable_grad(), torch.autocast(some.device.type, enabled=False):
            batch = self._batch(x)
            self._refuse_misfit(call.size, batch)
            states = [self._states(state, flat, batch) for state in ([hx] if isinstance(hx, Tensor) else hx or ())]
            layers, outputs = self._unroll(batch, states, self._masks(call, batch))
            given = [None if grad is None else self._states(grad, flat, batch) for grad in grads[-2:]]
            d = gradients(layers, outputs, [self._at_output(grads[0], flat, batch), *given])

        def rows(t: Tensor) -> Tensor:
            t = t.transpose(0, 1)
            if batch.order is not None:
                t = torch.empty_like(t).index_copy_(0, batch.order, t)
            return t.reshape(call.size, -1, t.shape[-1]).to(some.dtype)

        stored = []
        for layer, (at_gates, at_projection) in zip(layers, d, strict=True):
            if at_gates is not None:
                stored += self.stored(layer, at_gates, at_projection, rows)
        return stored

    def _batch(self, x: Tensor | PackedSequence) -> Batch:
        """The input as (T, N, I) in the precision of the computation."""
        if isinstance(x, PackedSequence):
            # batch_sizes are on the CPU: nothing waits for a GPU.
            active = torch.arange(int(x.batch_sizes[0])) < x.batch_sizes.unsqueeze(1)
            rows = active.flatten().nonzero().squeeze(1).to(x.data.device)
            batch = Batch(x.data, active.unsqueeze(-1).to(x.data.device), rows, x.sorted_indices)
            batch.x = batch.padded(exact(x.data))
            return batch
        x = x.detach()
        if x.ndim == 2:
            return Batch(exact(x.unsqueeze(1)))
        return Batch(exact(x.transpose(0, 1) if self._rnn.batch_first else x))

    def _refuse_misfit(self, size: int, batch: Batch) -> None:
        """Raise CannotSplit if the sequences are no multiple of the samples, or stand where the time should."""
        steps, sequences = batch.x.shape[:2]
        if sequences % size or (steps == size != sequences):
            raise CannotSplit(f"it saw {sequences} sequences of {steps} steps for a batch of {size} samples")

    def _states(self, t: Tensor, flat: bool, batch: Batch) -> Tensor:
        """Initial or final states, or their gradients, as (layers, N, H) in the order of the batch."""
        t = exact(t.detach().unsqueeze(1) if flat else t.detach())
        return t if batch.order is None else t.index_select(1, batch.order)

    def _at_output(self, grad: Tensor | None, flat: bool, batch: Batch) -> Tensor | None:
        """The gradient at the output as (T, N, P)."""
        if grad is None:
            return None
        grad = exact(grad.detach())
        if batch.active is not None:
            return batch.padded(grad)
        if flat:
            return grad.unsqueeze(1)
        return grad.transpose(0, 1) if self._rnn.batch_first else grad

    def _unroll(
        self, batch: Batch, states: list[Tensor], masks: list[Tensor]
    ) -> tuple[list[Layer], list[Tensor | None]]:
        """All layers and directions; and output (T, N, DP), h_n (DL, N, P), c_n (DL, N, H; None without cells)."""
        rnn = self._rnn
        directions = 2 if rnn.bidirectional else 1
        x, layers = batch.x, []
        last_h: list[Tensor] = []
        last_c: list[Tensor] = []
        for number in range(rnn.num_layers):
            outputs = []
            for direction in range(directions):
                place = number * directions + direction
                h = states[0][place] if states else x.new_zeros(x.shape[1], self._width)
                zeros = None if self._kind != "LSTM" else x.new_zeros(x.shape[1], rnn.hidden_size)
                c = states[1][place] if len(states) > 1 else zeros
                suffix = f"_l{number}" + ("_reverse" if direction else "")
                layer, output, h, c = self.direction(suffix, Batch(x, batch.active), h, c, reverse=direction == 1)
                layers.append(layer)
                outputs.append(output)
                last_h.append(h)
                last_c += [] if c is None else [c]
            x = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
            if number < len(masks):
                x = x * masks[number]
        return layers, [x, torch.stack(last_h), torch.stack(last_c) if last_c else None]

    def _masks(self, call: ModuleCall, batch: Batch) -> list[Tensor]:
        """What dropout multiplied each layer's output by, (T, N, DP), drawn again from the generator's state.

        Raises:
            CannotSplit: if it cannot be drawn again.
        """
        rnn = self._rnn
        if not (rnn.training and rnn.dropout and rnn.num_layers > 1):
            return []
        if batch.x.device.type != "cpu":
            raise CannotSplit("dropout between its layers draws its masks inside the GPU's library")
        if call.rng is None:
            raise CannotSplit("dropout between its layers: the state of the random generator was not kept")
        generator = torch.Generator()
        generator.set_state(call.rng)
        width = self._width * (2 if rnn.bidirectional else 1)
        shape = batch.x.shape[:2] if batch.active is None else (int(batch.active.sum()),)
        masks = []
        for _ in range(rnn.num_layers - 1):
            # As at::dropout does it: on the time-first output, which is contiguous, or on the packed rows.
            mask = torch.zeros(*shape, width, dtype=batch.x.dtype)
            if rnn.dropout < 1:
                mask.bernoulli_(1 - rnn.dropout, generator=generator).div_(1 - rnn.dropout)
            if batch.active is not None:
                mask = batch.padded(mask)
            masks.append(mask)
        return masks


class RecurrentCell(Unrolled):
    """Handler of nn.RNNCell, nn.LSTMCell and nn.GRUCell: one step."""

    def __init__(self, name: str, module: nn.RNNCellBase, firsts: dict[int, int]) -> None:
        super().__init__(name, module, firsts, _kind_of(module))
        self._cell = module

    def __call__(self, call: ModuleCall) -> list[Stored]:
        """One site for the input's map and one for the hidden state's.

        Raises:
            CannotSplit: if the rows are no multiple of the samples.
        """
        if all(grad is None for grad in call.grads):
            return []
        self.refuse_others()
        x = call.args[0] if call.args else call.kwargs["input"]
        hx = call.args[1] if len(call.args) > 1 else call.kwargs.get("hx")
        half = next(grad.dtype for grad in call.grads if grad is not None)
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            x = exact(x.detach()).reshape(-1, x.shape[-1])
            if len(x) % call.size:
                raise CannotSplit(f"it saw {len(x)} rows for a batch of {call.size} samples")
            given = [hx] if isinstance(hx, Tensor) else list(hx or ())
            states = [exact(state.detach()).reshape(len(x), -1) for state in given]
            zeros = x.new_zeros(len(x), self._cell.hidden_size)
            h = states[0] if states else zeros
            c = None if self._kind != "LSTM" else states[1] if states else zeros
            layer, _, h, c = self.direction("", Batch(x.unsqueeze(0)), h, c)
            grads = [None if grad is None else exact(grad.detach()).reshape(len(x), -1) for grad in call.grads]
            ((at_gates, _),) = gradients([layer], [h, c], grads)

        def rows(t: Tensor) -> Tensor:
            return t.reshape(call.size, -1, t.shape[-1]).to(half)

        return [] if at_gates is None else self.stored(layer, at_gates, None, rows)


def _kind_of(cell: nn.RNNCellBase) -> str:
    return "LSTM" if isinstance(cell, nn.LSTMCell) else "GRU" if isinstance(cell, nn.GRUCell) else "RNN"


HANDLERS: dict[type[nn.Module], type] = {
    nn.RNN: Recurrent,
    nn.LSTM: Recurrent,
    nn.GRU: Recurrent,
    nn.RNNCell: RecurrentCell,
    nn.LSTMCell: RecurrentCell,
    nn.GRUCell: RecurrentCell,
}
"""Handler classes by the class whose forward pass must be unchanged."""
