"""Checks of the core's annotations at run time, by jaxtyping's import hook with beartype."""

import jaxtyping
from beartype import BeartypeConf, beartype

# PEP 484: an int is acceptable where a float is expected.
typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))

CORE = (
    "arrays",
    "denoiser",
    "editing",
    "guidance",
    "images",
    "labels",
    "likelihood",
    "losses",
    "process",
    "sampling",
    "schedules",
    "timesteps",
    "draws",
    "coordinates",
)


def import_core_with_checks() -> None:
    """Imports the core so that every call checks arguments and result. Must be the first import of the package."""
    modules = [f"diffusion_jax.{name}" for name in CORE]
    with jaxtyping.install_import_hook(modules, "helpers.type_checks.typechecker"):
        from diffusion_jax import denoiser, images, schedules  # noqa: F401

    # JAX builds pytrees of placeholders, so fields need not be arrays.
    denoiser.Denoiser.__init__.__no_type_check__ = True
    schedules.Schedule.__init__.__no_type_check__ = True
    schedules.paths.Interpolated.__init__.__no_type_check__ = True
    schedules.paths._Shifted.__init__.__no_type_check__ = True
