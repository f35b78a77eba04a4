"""The published weights that `pretrained.load` reads: names, sizes, licenses, pages, and the FIDs that papers report."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusion_jax.errors import print_text
from diffusion_jax.pretrained import openai
from diffusion_jax.storage import hub

_GOOGLE = (
    "cifar10-32",
    *(f"{kind}-256" for data in ("bedroom", "cat", "celebahq", "church") for kind in (data, f"ema-{data}")),
)
_REPOSITORIES = {"improved": "improved-diffusion", "adm": "guided-diffusion"}
_REPOSITORIES |= dict.fromkeys(("edm", "consistency"), "consistency_models")
_HO = {  # Ho et al.'s weights in the PyTorch port: {data set: (training step, thousands of parameters)}
    "cifar10": (790_000, 35_746),
    "lsun_bedroom": (2_388_000, 113_673),
    "lsun_cat": (1_761_000, 113_673),
    "lsun_church": (4_432_000, 113_673),
}
_EDM = {  # {EDM's file: thousands of parameters}
    "edm-cifar10-32x32-cond-vp": 55_734,
    "edm-cifar10-32x32-uncond-vp": 55_733,
    "edm-ffhq-64x64-uncond-vp": 61_804,
    "edm-afhqv2-64x64-uncond-vp": 61_804,
    "edm-cifar10-32x32-cond-ve": 56_398,
    "edm-cifar10-32x32-uncond-ve": 56_396,
    "edm-ffhq-64x64-uncond-ve": 62_759,
    "edm-afhqv2-64x64-uncond-ve": 62_759,
    "edm-imagenet-64x64-cond-adm": 295_899,
}
# Thousands of parameters in OpenAI's networks; each parameter takes 4 bytes in a file.
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
    "consistency_imagenet64": 295_899,
    "consistency_lsun": 526_305,
    "adm_upsampler_64_256": 311_796,
    "adm_upsampler_128_512": 308_835,
    "adm_lsun": 552_814,
    "adm_classifier64": 65_439,
    "adm_classifier128": 42_568,
    "adm_classifier256": 54_096,
    "adm_classifier512": 54_448,
}


class Reported(NamedTuple):
    """The FID that a paper reports. settings: those that the paper or its code states; no `sampling.steps` if unknown."""

    fid: float
    paper: str
    settings: Mapping[str, Any]


_CIFAR10, _ALL_STEPS = {"data.dataset": "cifar10"}, {"sampling.steps": None}
_ADM_STEPS = {"sampling.steps": 250, "sampling.spacing": "openai"}
_HEUN = {"sampling.sampler": "heun", "sampling.spacing": "karras"}
_CHURN = {"sampling.churn": 40.0, "sampling.churn_range": (0.05, 50.0), "sampling.churn_noise": 1.003}
_FIDS: dict[str, dict[str, tuple[float, dict[str, Any]]]] = {  # {paper: {name of the weights: (FID, settings)}}
    "Ho et al. 2020": {
        "ddpm-cifar10-32": (3.17, _CIFAR10 | _ALL_STEPS),
        "ddpm-ema-bedroom-256": (6.36, _ALL_STEPS),
        "ddpm-ema-church-256": (7.89, _ALL_STEPS),
        "ddpm-ema-cat-256": (19.75, _ALL_STEPS),
    },
    "Nichol & Dhariwal 2021": {
        "cifar10_uncond_50M_500K.pt": (3.19, _CIFAR10),
        "cifar10_uncond_vlb_50M_500K.pt": (11.47, _CIFAR10),
        "imagenet64_uncond_100M_1500K.pt": (19.2, {}),
        "imagenet64_uncond_vlb_100M_1500K.pt": (40.1, {}),
    },
    "Dhariwal & Nichol 2021": {
        "64x64_diffusion.pt": (2.07, _ADM_STEPS),
        **{
            f"{size}x{size}_diffusion.pt": (
                fid,
                _ADM_STEPS
                | {
                    "sampling.classifier": f"{size}x{size}_classifier.pt",
                    "sampling.classifier_form": "mean",
                    "sampling.classifier_scale": scale,
                },
            )
            for size, fid, scale in ((128, 2.97, 0.5), (256, 4.59, 1.0), (512, 7.72, 4.0))
        },
        "lsun_bedroom.pt": (1.90, _ALL_STEPS),
        "lsun_cat.pt": (5.57, _ALL_STEPS),
        "lsun_horse.pt": (2.57, _ALL_STEPS),
    },
    "Karras et al. 2022": {
        "edm-cifar10-32x32-cond-vp.pkl": (1.79, _CIFAR10 | _HEUN | {"sampling.steps": 18}),
        "edm-cifar10-32x32-uncond-vp.pkl": (1.97, _CIFAR10 | _HEUN | {"sampling.steps": 18}),
        "edm-imagenet-64x64-cond-adm.pkl": (1.36, _HEUN | _CHURN | {"sampling.steps": 256}),
    },
    "Song et al. 2023": {
        "cd_imagenet64_lpips.pt": (6.20, {"sampling.sampler": "consistency", "sampling.steps": 1}),
    },
}
_PROTOCOL = {
    "data.split": "train",
    "evaluation.reference_split": "",
    "evaluation.num_samples": 50_000,
    "evaluation.use_ema": True,
    "sampling.sampler": "ddpm",
    "sampling.guidance_scale": 1.0,
}
_REPORTED = {
    name: Reported(fid, paper, _PROTOCOL | settings)
    for paper, found in _FIDS.items()
    for name, (fid, settings) in found.items()
}


class PublishedWeights(NamedTuple):
    """Weights that `pretrained.load` reads.

    name: the argument of `load`: a name on the Hub, or a file to download from `page`. family: the start of `Model.family`.
    megabytes: the approximate size. license: the weights' license according to the page. sha256: None if unknown; downloads
    from the Hub are compared with the Hub's digest.
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

    def add(name: str, family: str, thousands: int, license: str, page: str) -> None:
        found.append(PublishedWeights(name, family, round(thousands * 4e-3), license, f"https://{page}"))

    for name in _GOOGLE:
        thousands = 35_746 if name.endswith("32") else 113_673
        add(f"hf://google/ddpm-{name}", "diffusers", thousands, "Apache-2.0", f"huggingface.co/google/ddpm-{name}")
    for data, (step, thousands) in _HO.items():
        for prefix in ("ema_", ""):
            file = f"{prefix}diffusion_{data}_model/model-{step}.ckpt"
            add(file, "Ho et al.", thousands, "MIT", "github.com/pesser/pytorch_diffusion")
    for file, preset in openai.FILES.items():
        repository = _REPOSITORIES[preset.partition("_")[0]]
        add(f"{file}.pt", "OpenAI", _THOUSANDS[preset], "MIT", f"github.com/openai/{repository}")
    for file, thousands in _EDM.items():
        add(f"{file}.pkl", "EDM", thousands, "CC BY-NC-SA 4.0", "github.com/NVlabs/edm")
    return tuple(found)


def find_reported(path: str) -> Reported | None:
    """Returns the reported FID of weights, given the published name of the repository or file; None if unknown."""
    name = _name_of(path)
    is_other = hub.is_hub(path) and not path.startswith("hf://google/") and not name.endswith((".pt", ".pkl"))
    return None if is_other else _REPORTED.get(name)


@functools.cache
def find_origin(name: str) -> dict[str, str]:
    """Returns the source, license and page of a file with a published name, and prints them; {} for other names."""
    known = find_known(name)
    if known is None:
        return {}
    print_text(f"License of {name}, if it is the published file: {known.license} ({known.page})")
    return {"source": name, "license": known.license, "page": known.page}


def find_known(path: str) -> PublishedWeights | None:
    """Returns the entry of `available` with the file name in `path`; None for other names."""
    return next((known for known in available() if known.name == _name_of(path)), None)


def _name_of(path: str) -> str:
    return pathlib.PurePath(path.partition("@")[0] if hub.is_hub(path) else path).name


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
