"""A memory spread over devices (`DocumentLayout.axes`): over which mesh, and what a device's part of it is."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from msa_jax.memory.bank import DocumentLayout


def mesh_of(layout: DocumentLayout) -> jax.sharding.AbstractMesh:
    mesh = jax.sharding.get_abstract_mesh()
    missing = [name for name in layout.axes if name not in mesh.axis_names]
    if mesh.empty or missing:
        raise ValueError(
            f"this memory is spread over the mesh axes {', '.join(layout.axes)}, and the mesh in scope has "
            f"{', '.join(mesh.axis_names) or 'none'}: call under jax.set_mesh of the mesh that it was made for."
        )
    ways = math.prod(mesh.shape[name] for name in layout.axes)
    if layout.num_chunks % ways or layout.num_documents % ways:
        raise ValueError(
            f"{layout.num_chunks} chunks and {layout.num_documents} documents cannot be spread over {ways} devices: "
            f"pad both to multiples of {ways}."
        )
    return mesh


def batch_axis(mesh: jax.sharding.AbstractMesh, layout: DocumentLayout, size: int) -> str | None:
    """The mesh axis of questions, unless documents have it."""
    free = "data" in mesh.axis_names and "data" not in layout.axes
    return "data" if free and size % mesh.shape["data"] == 0 else None


def local_layout(layout: DocumentLayout) -> DocumentLayout:
    """A device's part of a layout, numbered from 0."""
    device = jax.lax.axis_index(layout.axes) if layout.axes else 0
    first_chunk, first_document = device * layout.num_chunks, device * layout.num_documents
    return dataclasses.replace(
        layout,
        chunk_documents=jnp.clip(layout.chunk_documents - first_document, 0, layout.num_documents),
        starts=layout.starts - first_chunk,
        axes=None,
    )


def layout_specs(layout: DocumentLayout) -> DocumentLayout:
    axes = P(layout.axes or None)
    return dataclasses.replace(layout, chunk_documents=axes, starts=axes, lengths=axes)
