"""The list of published weights."""

import math

import pytest

from diffusion_jax import pretrained
from diffusion_jax.config.table import SETTINGS
from diffusion_jax.models import UNet, preset
from diffusion_jax.pretrained import __main__, catalog, openai, parameters
from diffusion_jax.storage import hub


def test_list_names_what_loads(capsys):
    known = pretrained.available()
    names = [weights.name for weights in known]
    assert len(set(names)) == len(names) and "hf://google/ddpm-cifar10-32" in names
    for weights in known:
        file = weights.name.removesuffix(".pt").removesuffix(".pkl")
        assert file.startswith(("hf://google/ddpm-", "edm-")) or "diffusion_" in file or file in openai.FILES
        assert weights.license in ("Apache-2.0", "MIT", "CC BY-NC-SA 4.0") and weights.page.startswith("https://")
        assert weights.sha256 is None  # no source at hand states one
    __main__.main(["list"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(known) and all("unchecked" in row for row in rows)
    assert header.split() == ["name", "family", "size", "license", "SHA-256", "page"]


# {(family, license, page): {name: number of parameters}}, typed from the projects' pages and flags.
PUBLISHED = {
    ("Ho et al.", "MIT", "github.com/pesser/pytorch_diffusion"): {
        f"{prefix}diffusion_{name}.ckpt": parameters
        for prefix in ("ema_", "")
        for name, parameters in (
            ("cifar10_model/model-790000", 35_746_307),
            ("lsun_bedroom_model/model-2388000", 113_673_219),
            ("lsun_cat_model/model-1761000", 113_673_219),
            ("lsun_church_model/model-4432000", 113_673_219),
        )
    },
    ("OpenAI", "MIT", "github.com/openai/improved-diffusion"): {
        "cifar10_uncond_50M_500K.pt": 52_546_438,
        "cifar10_uncond_vlb_50M_500K.pt": 52_546_438,
        "imagenet64_uncond_100M_1500K.pt": 121_063_942,
        "imagenet64_uncond_vlb_100M_1500K.pt": 121_063_942,
        "imagenet64_cond_270M_250K.pt": 273_049_350,
        "upsample_cond_500K.pt": 279_792_390,
        "lsun_uncond_100M_1200K_bs128.pt": 113_676_678,
        "lsun_uncond_100M_2400K_bs64.pt": 113_676_678,
    },
    ("OpenAI", "MIT", "github.com/openai/guided-diffusion"): {
        "64x64_diffusion.pt": 295_904_454,
        "128x128_diffusion.pt": 421_529_606,
        "256x256_diffusion.pt": 553_838_086,
        "512x512_diffusion.pt": 558_997_638,
        "256x256_diffusion_uncond.pt": 552_814_086,
        "64_256_upsampler.pt": 311_795_910,
        "128_512_upsampler.pt": 308_835_270,
        **dict.fromkeys(("lsun_bedroom.pt", "lsun_cat.pt", "lsun_horse.pt", "lsun_horse_nodropout.pt"), 552_814_086),
        "64x64_classifier.pt": 65_438_568,
        "128x128_classifier.pt": 42_568_040,
        "256x256_classifier.pt": 54_096_360,
        "512x512_classifier.pt": 54_448_360,
    },
    ("OpenAI", "MIT", "github.com/openai/consistency_models"): {
        **dict.fromkeys(("edm_bedroom256_ema.pt", "cd_bedroom256_l2.pt", "cd_bedroom256_lpips.pt"), 526_304_771),
        **dict.fromkeys(("edm_cat256_ema.pt", "cd_cat256_l2.pt", "cd_cat256_lpips.pt"), 526_304_771),
        **dict.fromkeys(("ct_bedroom256.pt", "ct_cat256.pt"), 526_304_771),
        **dict.fromkeys(("edm_imagenet64_ema.pt", "ct_imagenet64.pt"), 295_899_267),
        **dict.fromkeys(("cd_imagenet64_l2.pt", "cd_imagenet64_lpips.pt"), 295_899_267),
    },
    ("EDM", "CC BY-NC-SA 4.0", "github.com/NVlabs/edm"): {
        "edm-cifar10-32x32-cond-vp.pkl": 55_734_019,
        "edm-cifar10-32x32-uncond-vp.pkl": 55_732_739,
        "edm-ffhq-64x64-uncond-vp.pkl": 61_804_419,
        "edm-afhqv2-64x64-uncond-vp.pkl": 61_804_419,
        "edm-cifar10-32x32-cond-ve.pkl": 56_398_211,
        "edm-cifar10-32x32-uncond-ve.pkl": 56_395_651,
        "edm-ffhq-64x64-uncond-ve.pkl": 62_758_915,
        "edm-afhqv2-64x64-uncond-ve.pkl": 62_758_915,
        "edm-imagenet-64x64-cond-adm.pkl": 295_899_267,
    },
    **{
        ("diffusers", "Apache-2.0", f"huggingface.co/google/ddpm-{name}"): {f"hf://google/ddpm-{name}": parameters}
        for name, parameters in {
            "cifar10-32": 35_746_307,
            **dict.fromkeys(("bedroom-256", "cat-256", "celebahq-256", "church-256"), 113_673_219),
            **dict.fromkeys(("ema-bedroom-256", "ema-cat-256", "ema-celebahq-256", "ema-church-256"), 113_673_219),
        }.items()
    },
}
PROTOCOL = {"split": "train", "reference_split": "", "num_samples": 50_000, "use_ema": True, "guidance_scale": 1.0}
ADM = {"sampler": "ddpm", "steps": 250, "spacing": "openai"}
GUIDED = ADM | {"classifier_form": "mean"}
HEUN = {"sampler": "heun", "spacing": "karras"}
# {paper: {weights: (FID, settings beside the protocol)}}, typed from the papers' tables. No "steps": the number is unknown.
REPORTED = {
    "Ho et al. 2020": {
        "ddpm-cifar10-32": (3.17, {"sampler": "ddpm", "steps": None, "dataset": "cifar10"}),
        "ddpm-ema-bedroom-256": (6.36, {"sampler": "ddpm", "steps": None}),
        "ddpm-ema-church-256": (7.89, {"sampler": "ddpm", "steps": None}),
        "ddpm-ema-cat-256": (19.75, {"sampler": "ddpm", "steps": None}),
    },
    "Nichol & Dhariwal 2021": {
        "cifar10_uncond_50M_500K.pt": (3.19, {"sampler": "ddpm", "dataset": "cifar10"}),
        "cifar10_uncond_vlb_50M_500K.pt": (11.47, {"sampler": "ddpm", "dataset": "cifar10"}),
        "imagenet64_uncond_100M_1500K.pt": (19.2, {"sampler": "ddpm"}),
        "imagenet64_uncond_vlb_100M_1500K.pt": (40.1, {"sampler": "ddpm"}),
    },
    "Dhariwal & Nichol 2021": {
        "64x64_diffusion.pt": (2.07, ADM),
        "128x128_diffusion.pt": (2.97, GUIDED | {"classifier": "128x128_classifier.pt", "classifier_scale": 0.5}),
        "256x256_diffusion.pt": (4.59, GUIDED | {"classifier": "256x256_classifier.pt", "classifier_scale": 1.0}),
        "512x512_diffusion.pt": (7.72, GUIDED | {"classifier": "512x512_classifier.pt", "classifier_scale": 4.0}),
        "lsun_bedroom.pt": (1.90, {"sampler": "ddpm", "steps": None}),
        "lsun_cat.pt": (5.57, {"sampler": "ddpm", "steps": None}),
        "lsun_horse.pt": (2.57, {"sampler": "ddpm", "steps": None}),
    },
    "Karras et al. 2022": {
        "edm-cifar10-32x32-cond-vp.pkl": (1.79, HEUN | {"steps": 18, "dataset": "cifar10"}),
        "edm-cifar10-32x32-uncond-vp.pkl": (1.97, HEUN | {"steps": 18, "dataset": "cifar10"}),
        "edm-imagenet-64x64-cond-adm.pkl": (
            1.36,
            HEUN | {"steps": 256, "churn": 40.0, "churn_range": (0.05, 50.0), "churn_noise": 1.003},
        ),
    },
    "Song et al. 2023": {"cd_imagenet64_lpips.pt": (6.20, {"sampler": "consistency", "steps": 1})},
}


def test_the_list_is_what_the_projects_published():
    expected = {
        (name, family, round(parameters * 4 / 1e6), license, f"https://{page}", None)  # no source states a digest
        for (family, license, page), files in PUBLISHED.items()
        for name, parameters in files.items()
    }
    known = pretrained.available()
    assert len(known) == len(expected) and set(known) == expected


def test_fids_and_settings_are_those_of_the_papers():
    expected = {
        name: (fid, paper, PROTOCOL | settings)
        for paper, found in REPORTED.items()
        for name, (fid, settings) in found.items()
    }
    found = {
        name: (reported.fid, reported.paper, {key.partition(".")[2]: v for key, v in reported.settings.items()})
        for name in {weights.name.rpartition("/")[2] for weights in pretrained.available()}
        if (reported := pretrained.find_reported(name))
    }
    assert found == expected


DDPMPP = UNet(architecture="ddpm++", resample_blocks=True, num_res_blocks=4)


@pytest.mark.parametrize(
    "file, model, size",
    [
        ("cifar10_uncond_50M_500K.pt", preset("improved_cifar10"), 32),
        ("ema_diffusion_lsun_cat_model/model-1761000.ckpt", preset("ddpm_256"), 256),
        ("64x64_classifier.pt", preset("adm_classifier64"), 64),
        ("edm-cifar10-32x32-cond-vp.pkl", DDPMPP.clone(channel_multipliers=(2, 2, 2), num_classes=10), 32),
        ("edm-ffhq-64x64-uncond-vp.pkl", DDPMPP.clone(attention_levels=(2,)), 64),
        (
            "edm-cifar10-32x32-uncond-ve.pkl",
            DDPMPP.clone(architecture="ncsn++", channel_multipliers=(2, 2, 2)),
            32,
        ),
        ("edm-imagenet-64x64-cond-adm.pkl", preset("edm_imagenet64"), 64),
    ],
)
def test_sizes_are_four_bytes_for_each_parameter(file, model, size):
    shapes = parameters.parameter_shapes(model, (size, size, 3))
    (weights,) = [weights for weights in pretrained.available() if weights.name == file]
    assert weights.megabytes == round(sum(map(math.prod, shapes.values())) * 4 / 1e6)


def test_names_on_the_hub_are_well_formed():
    assert all(hub._FORM.fullmatch(weights.name) for weights in pretrained.available() if hub.is_hub(weights.name))


@pytest.mark.parametrize(
    "name, fid",
    [
        ("hf://google/ddpm-cifar10-32@main", 3.17),
        ("hf://someone/ddpm-cifar10-32", None),
        ("hf://someone/edm/edm-cifar10-32x32-cond-vp.pkl@v1", 1.79),
        ("weights/ddpm-ema-cat-256", 19.75),
        ("weights/lsun_horse.pt", 2.57),
        ("weights/mine.pt", None),
        ("", None),
    ],
)
def test_what_a_paper_reports_is_found_by_published_names(name, fid):
    found = pretrained.find_reported(name)
    assert (found and found.fid) == fid


def test_settings_of_papers_exist():
    known = [weights.name for weights in pretrained.available()]
    found = [reported for name in known if (reported := pretrained.find_reported(name))]
    assert len(found) == len(catalog._REPORTED)
    for reported in found:
        assert reported.settings.keys() <= SETTINGS.keys()
    guided = pretrained.find_reported("256x256_diffusion.pt")
    assert guided.settings["sampling.classifier"].removesuffix(".pt") in openai.FILES
    assert guided.settings["sampling.classifier_form"] == "mean"  # as in the paper


def test_the_license_and_the_page_of_a_published_file_are_known_by_its_name(tmp_path, capsys):
    name = "edm-cifar10-32x32-uncond-ve.pkl"
    for _ in range(2):
        assert catalog.find_origin(name)["license"] == "CC BY-NC-SA 4.0"
    assert capsys.readouterr().out.count(f"License of {name}") == 1
    assert catalog.find_origin("mine.pkl") == {} and not capsys.readouterr().out
    with pytest.raises(pretrained.PretrainedError, match="download it from https://github.com/NVlabs/edm$"):
        pretrained.load(tmp_path / name)
