"""Published weights of every family by their names on the Hub: sampled and evaluated in one command, edited, and trained."""

import json

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import cli, models, pretrained
from diffusion_jax.pretrained import openai, parameters
from diffusion_jax.report import write_report
from diffusion_jax.runs import edit, evaluate, train
from diffusion_jax.storage import hub
from helpers.edm_networks import ADM, DDPMPP, NCSNPP, Network
from helpers.hub_server import Repository, hub_server
from helpers.published_files import NARROW_FLAGS, ho_variables, save_with_tensorflow, stored, write_folder
from helpers.torch_files import archive_bytes, edm_pickle, tensors

pytest.importorskip("huggingface_hub")
from huggingface_hub import constants

SMALL = {"label_dim": 3, "augment_dim": 2, "channel_mult": [1, 1], "attn_resolutions": [4], "label_dropout": 0}
NARROW = models.UNet(
    channels=32,
    channel_multipliers=(1, 1),
    num_res_blocks=1,
    **{"attention_levels": (1,), "head_channels": 16, "out_channels": 3, "time_scale": 1000.0, "num_classes": 3},
)


def edm_file(directory, arguments):
    arrays = Network(arguments["model_type"], arguments).draw()
    named = {f"model.{name}": value for name, value in arrays.items()}
    return edm_pickle("EDMPrecond", named, arguments, directory / "marker")


def openai_file():
    """OpenAI's names and layout, with q, k and v in one tensor."""
    generator, arrays = np.random.default_rng(0), {}
    for path, shape in parameters.parameter_shapes(NARROW, (8, 8, 3)).items():
        name, shape = openai.NAMING(path, NARROW), parameters.torch_shape(shape, path)
        if any(f".{layer}." in name for layer in "kv"):
            continue
        if ".q." in name:
            name, shape = name.replace(".q.", ".qkv."), (3 * shape[0], *shape[1:], *(1,) * (len(shape) - 1))
        arrays[name] = (generator.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) + 1)).astype(np.float32)
    return archive_bytes(tensors(arrays))


def diffusers_files(directory):
    weights, arrays = stored("unet_ddpm_cifar10_narrow")
    folder = write_folder(directory / "pipeline", json.loads(str(arrays["config"])), weights)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ho_files(directory):
    """A TensorFlow checkpoint of the moving average."""
    weights = ho_variables(stored("port_narrow")[0])
    averages = {f"{name}/ExponentialMovingAverage": value for name, value in weights.items()}
    save_with_tensorflow(directory / "ho" / "model.ckpt", averages, global_step=7)
    return {path.name: path.read_bytes() for path in (directory / "ho").iterdir()}


HO_FLAGS = '{"image_size": 16, "variance": "fixed_small"}'
FAMILIES = {  # how the files are made, the file in the name, and what the file lacks
    "diffusers": (diffusers_files, "", ""),
    "adm": (lambda _: {"narrow.pt": archive_bytes(tensors(stored("openai_narrow")[0]))}, "/narrow.pt", NARROW_FLAGS),
    "ho": (ho_files, "/model.ckpt-7", HO_FLAGS),
    "edm": (lambda _: {"edm_imagenet64_ema.pt": openai_file()}, "/edm_imagenet64_ema.pt", ""),
    "consistency": (lambda _: {"cd_imagenet64_l2.pt": openai_file()}, "/cd_imagenet64_l2.pt", ""),
    "edm_adm": (lambda directory: {"adm.pkl": edm_file(directory, ADM | SMALL)}, "/adm.pkl", ""),
    "edm_ddpmpp": (lambda directory: {"edm-cifar10-32x32-cond-vp.pkl": edm_file(directory, DDPMPP | SMALL)}, "", ""),
    "edm_ncsnpp": (lambda directory: {"ve.pkl": edm_file(directory, NCSNPP | SMALL)}, "/ve.pkl", ""),
}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A function (family, mode, flags) that returns the parsed command and starts a server for the family."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    presets = ("edm_imagenet64", "consistency_imagenet64")
    monkeypatch.setattr(openai, "preset", lambda name: NARROW if name in presets else models.preset(name))
    for name in presets:
        monkeypatch.setitem(openai.PRESETS, name, (8, 0, openai.PRESETS[name][2]))
    (tmp_path / "images").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)):
        (folder := tmp_path / "images" / str(i % 3)).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    servers = []

    def parse(family, mode, *settings, workdir="run"):
        make_files, file, flags = FAMILIES[family]
        if not servers:
            hub.download.cache_clear()  # the cached files may be in the folder of an earlier test
            servers.append(hub_server(**{f"me/{family}": Repository(make_files(tmp_path))}))
            monkeypatch.setattr(constants, "ENDPOINT", servers[0].__enter__())
            template = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        settings = [f"--config.{setting}" for setting in (f"data.data_dir={tmp_path / 'images'}", *settings)]
        where = [f"--pretrained=hf://me/{family}{file}", f"--workdir={tmp_path / workdir}", f"--mode={mode}"]
        found = cli.parse([*where, f"--pretrained_flags={flags}", *settings])
        return found.config, found.workdir

    yield parse
    servers[0].__exit__(None, None, None)


MEASURE = ("evaluation.num_samples=4", "evaluation.metrics=energy_distance")
MEASURE += ("evaluation.num_examples=2", "evaluation.strata=3")


@pytest.mark.whole
@pytest.mark.parametrize("family", FAMILIES)
def test_one_command_samples_and_evaluates(command, family, capsys):
    has_bound = family == "edm_ncsnpp"
    steps = ("sampling.steps=3",) if family in ("diffusers", "adm", "ho") else ()  # else the published sampler's
    config, workdir = command(family, "evaluate", *MEASURE, *steps, f"evaluation.likelihood={has_bound}")
    evaluate.run(config, workdir)
    (samples,) = json.loads((workdir / "metrics.json").read_text())
    assert np.isfinite(samples["energy_distance"]) and samples["num_samples"] == 4
    assert (workdir / "likelihood.json").exists() == has_bound
    sampler = "ddpm with 3 steps" if steps else "consistency with 1 step" if family == "consistency" else "heun with"
    assert f"sampling.seed=0, {sampler}" in capsys.readouterr().out


@pytest.mark.whole
def test_networks_of_edm_s_pickles_are_edited_and_trained(command, tmp_path):
    """Training leaves NCSN++'s frequencies as they are."""
    config, workdir = command("edm_ncsnpp", "edit", "editing.task=colorize", "editing.example=1")
    edit.run(config, workdir)
    assert list((workdir / "samples" / "edits").glob("*.png"))

    small = ("training.batch_size=8", "training.sample_every=0", "training.log_every=2", "optimizer.warmup_steps=0")
    config, workdir = command("edm_ncsnpp", "train", *small, "training.num_steps=2", workdir="trained")
    train.run(config, workdir)
    assert "hf://me/edm_ncsnpp/ve.pkl" in write_report(workdir).read_text()
    trained, given = (pretrained.load(source).params for source in (workdir, config.init_from))
    np.testing.assert_array_equal(trained["time_fourier"]["frequencies"], given["time_fourier"]["frequencies"])
    assert not np.array_equal(trained["conv_in"]["kernel"], given["conv_in"]["kernel"])
