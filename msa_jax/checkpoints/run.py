"""Checkpoints of a run (Orbax): parameters, optimiser state, step, and the position in the data."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from msa_jax.errors import CheckpointError

if TYPE_CHECKING:
    import grain


def _abstract(tree):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


class Checkpoints:
    """The checkpoints of one run, newest kept; a save is asynchronous and atomic.

    Args:
      folder: where they live; made on the first save.
      keep: how many stay.
    """

    def __init__(self, folder: str | pathlib.Path, *, keep: int = 2):
        self._folder = pathlib.Path(folder).absolute()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
            ),
        )

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: grain.DatasetIterator) -> None:
        """Start saving; returns once the state is copied. A step that is already saved is left as it is.

        Of several processes each writes its own parts of the arrays, and the position in the data, which is the same
        in all, is written once: any number of processes can restore it.
        """
        if step == self.latest_step:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data.get_state())
            ),
        )

    def restore(self, state: Any, data: grain.DatasetIterator) -> Any:
        """Latest state, given one of the same shapes, spread as that one; `data` is moved to its position in place.

        Raises:
          CheckpointError: there is none, or its arrays do not fit `state`.
        """
        step = self._need_step()
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(_abstract(state)),
                    data=ocp.args.JsonRestore(),
                ),
            )
        except (ValueError, KeyError, FileNotFoundError) as e:
            raise CheckpointError(
                f"{self._folder}/{step}: this checkpoint does not fit the model or optimiser of the config; "
                f"use the config it was trained with, or another workdir. ({str(e).splitlines()[0]})"
            ) from e
        data.set_state(restored.data)
        return restored.state

    def restore_params(self, params: nnx.State, *, ema: bool, step: int | None = None) -> nnx.State:
        """Parameters alone (or their moving average), whole on the first device of this process.

        Args:
          params: of the same shapes, which is all that is read of them.
          step: of which; None for the latest.

        Raises:
          CheckpointError: there is none, or its arrays do not fit.
        """
        step = self._need_step(step)
        name = "ema" if ema else "params"
        # All processes restore together, so the arrays are on a device of each, whole.
        firsts = {device.process_index: device for device in reversed(jax.devices())}
        everywhere = jax.NamedSharding(jax.sharding.Mesh(list(firsts.values()), ("process",)), jax.P())
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)  # noqa: E731
        wanted = {name: jax.tree.map(place, nnx.to_pure_dict(params))}
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(
                        wanted,
                        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                        partial_restore=True,
                    )
                ),
            )
        except (ValueError, KeyError, FileNotFoundError) as e:
            raise CheckpointError(
                f"{self._folder}/{step}: this checkpoint does not fit the model of the config; use the config it "
                f"was trained with. ({str(e).splitlines()[0]})"
            ) from e
        flat = [x.addressable_data(0) for x in jax.tree.leaves(restored.state[name])]
        return jax.tree.unflatten(jax.tree.structure(params), flat)

    def _need_step(self, step: int | None = None) -> int:
        kept = sorted(self._manager.all_steps())
        if not kept:
            raise CheckpointError(f"{self._folder}: no checkpoint here; train first, or name another workdir.")
        if step is not None and step not in kept:
            there = ", ".join(map(str, kept))
            raise CheckpointError(f"{self._folder}: no checkpoint of step {step}; there are those of {there}.")
        return kept[-1] if step is None else step

    def wait(self) -> None:
        """Return when nothing is being saved any more."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
