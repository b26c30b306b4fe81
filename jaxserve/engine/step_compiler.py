"""Steps as compiled programs: traced, lowered and compiled for the devices of an engine, none of whose arrays exist."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxserve.batch import Bucket, Limits, State
from jaxserve.engine.tracing import ProgramStore, Recipe, buffer_shape, load_program, state_shapes
from jaxserve.weights import ModelPlan


@dataclass(frozen=True)
class StepCompiler:
    """Makes the program of a bucket.

    Attributes:
        leaves, state: what every step gets, as shapes.
        mesh: of the devices that run it.
        trace: exports the step of a bucket.
        digest: names the program of a bucket.
        store: programs exported earlier, if any are kept.
        options: of the XLA compiler.
    """

    leaves: tuple[jax.ShapeDtypeStruct, ...]
    state: State
    limits: Limits
    mesh: Mesh | AbstractMesh
    trace: Callable[[Bucket], bytes]
    digest: Callable[[Bucket], str]
    store: ProgramStore | None
    options: Mapping[str, str | bool]

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        model: ModelPlan,
        trace: Callable[[Bucket], bytes],
        store: ProgramStore | None,
        options: Mapping[str, str | bool],
    ) -> "StepCompiler":
        """For the steps of a recipe, on the devices of the model's mesh."""
        state = state_shapes(model.model_config, recipe.limits, model.dtype, model.mesh, mailboxes=recipe.mailboxes)
        leaves, named = tuple(model.parameters.values()), store if recipe.portable else None
        return cls(leaves, state, recipe.limits, model.mesh, trace, recipe.digest, named, options)

    def __call__(self, bucket: Bucket) -> jax.stages.Compiled:
        """Trace (or find in the store) and compile (or find in jax's cache)."""
        digest = "" if self.store is None else self.digest(bucket)
        blob = None if self.store is None else self.store.get(digest)
        if blob is None:
            blob = self.trace(bucket)
            if self.store is not None:
                self.store.put(digest, blob)
        return self.compile(bucket, blob)

    def compile(self, bucket: Bucket, blob: bytes) -> jax.stages.Compiled:
        """Compile an exported step (or find it in jax's cache); takes `(leaves, state, buffer)`."""
        program = load_program(blob, self.state)
        buffer = buffer_shape(bucket, self.limits, self.mesh)
        outputs = jax.tree.map(lambda shape: shape.sharding, self.state), NamedSharding(self.mesh, PartitionSpec())
        jitted = jax.jit(program, donate_argnums=1, out_shardings=outputs)
        lowered = jitted.lower(self.leaves, self.state, buffer)
        return lowered.compile(compiler_options=dict(self.options))
