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
