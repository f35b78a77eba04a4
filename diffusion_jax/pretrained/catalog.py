"""The published weights that `pretrained.load` reads: names, sizes, licenses and pages."""

from __future__ import annotations

from typing import NamedTuple

from diffusion_jax.pretrained import openai

_OPENAI = "https://github.com/openai/"
_GOOGLE = (
    "cifar10-32",
    *(f"{kind}-256" for data in ("bedroom", "cat", "celebahq", "church") for kind in (data, f"ema-{data}")),
)
_REPOSITORIES = {"improved": "improved-diffusion", "adm": "guided-diffusion", "edm": "consistency_models"}
_EDM = {  # EDM's files, and their parameters in thousands
    "edm-cifar10-32x32-cond-vp": 55_734,
    "edm-cifar10-32x32-uncond-vp": 55_733,
    "edm-ffhq-64x64-uncond-vp": 61_804,
    "edm-afhqv2-64x64-uncond-vp": 61_804,
    "edm-imagenet-64x64-cond-adm": 295_899,
}
# Parameters of OpenAI's networks, in thousands; the files have 4 bytes for each.
_THOUSANDS = {
    "improved_cifar10": 52_546,
    "improved_imagenet64": 121_064,
    "improved_imagenet64_conditional": 273_049,
    "improved_upsampler_64_256": 279_792,
    "improved_lsun": 113_677,
    "adm_imagenet64": 295_904,
    "adm_imagenet128": 421_530,
    "adm_imagenet256": 553_838,
    "adm_imagenet512": 558_998,
    "adm_imagenet256_unconditional": 552_814,
    "edm_imagenet64": 295_899,
    "edm_lsun": 526_305,
    "adm_upsampler_64_256": 311_796,
    "adm_upsampler_128_512": 308_835,
    "adm_lsun": 552_814,
    "adm_classifier64": 65_439,
    "adm_classifier128": 42_568,
    "adm_classifier256": 54_096,
    "adm_classifier512": 54_448,
}


class PublishedWeights(NamedTuple):
    """Weights that `pretrained.load` reads.

    name: what `load` takes: a name on the Hub, or the file, downloaded from `page`. family: as `Model.family` begins.
    megabytes: about. license: of the weights, as the page states it. sha256: None if no source at hand states one; names on
    the Hub are compared with the digest that the Hub states when they are downloaded.
    """

    name: str
    family: str
    megabytes: int
    license: str
    page: str
    sha256: str | None = None


def available() -> tuple[PublishedWeights, ...]:
    """Returns the published weights that are known to load."""
    found = []
    for name in _GOOGLE:
        size = 143 if name.endswith("32") else 455
        page = f"https://huggingface.co/google/ddpm-{name}"
        found.append(PublishedWeights(f"hf://google/ddpm-{name}", "diffusers", size, "Apache-2.0", page))
    for file, preset in openai.FILES.items():
        page = _OPENAI + _REPOSITORIES[preset.partition("_")[0]]
        found.append(PublishedWeights(f"{file}.pt", "OpenAI", round(_THOUSANDS[preset] * 4e-3), "MIT", page))
    for file, thousands in _EDM.items():
        found.append(
            PublishedWeights(
                f"{file}.pkl", "EDM", round(thousands * 4e-3), "CC BY-NC-SA 4.0", "https://github.com/NVlabs/edm"
            )
        )
    return tuple(found)


def format_available() -> str:
    """Returns a table of `available`, one line for each file."""
    header = ("name", "family", "size", "license", "SHA-256", "page")
    rows = [
        (known.name, known.family, f"{known.megabytes:,} MB", known.license, known.sha256 or "unchecked", known.page)
        for known in available()
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in lines)
