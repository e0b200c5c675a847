from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dreambooth.errors import ModelArtifactError
from dreambooth.model_folder.facts import read_facts

Make = Callable[..., Path]


@pytest.mark.parametrize(
    "options",
    [{}, {"sharded": True}, {"variant": "fp16"}, {"old_vae_names": True}],
    ids=str,
)
def test_the_headers_tell_what_the_loaded_model_has(
    make_model_folder: Make, options: dict[str, Any]
) -> None:
    import torch

    from dreambooth.diffusion import model

    folder = make_model_folder(prediction_type="v_prediction", **options)
    facts = read_facts(folder)
    loaded = model.load(folder, device=torch.device("cpu"))
    assert facts.unet_parameters == sum(p.numel() for p in loaded.unet.parameters())
    assert facts.vae_parameters == sum(p.numel() for p in loaded.vae.parameters())
    text_parameters = sum(p.numel() for p in loaded.text_encoder.parameters())
    assert facts.text_encoder_parameters == text_parameters
    assert facts.prediction_type == "v_prediction"
    assert (facts.resolution, facts.latent_channels, facts.vae_scale_factor) == (32, 4, 2)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_counts_of_old_weights_are_estimated_from_their_size(
    make_model_folder: Make, variant: str | None
) -> None:
    exact = read_facts(make_model_folder())
    estimated = read_facts(make_model_folder(bin=True, variant=variant))
    # The pickle's overhead is only this large because the network is so small.
    assert estimated.unet_parameters == pytest.approx(exact.unet_parameters, rel=0.1)


def test_the_model_info_states_the_resolution(make_model_folder: Make) -> None:
    assert read_facts(make_model_folder(model_info={"resolution": 48})).resolution == 48
    # Without one in the model info, the U-Net's configuration decides.
    assert read_facts(make_model_folder(model_info={"use_scheduler": True})).resolution == 32
    assert read_facts(make_model_folder(pixels=64)).resolution == 64


@pytest.mark.parametrize("value", ["512", 0, 10**9, 51.2, True, [512]])
def test_a_resolution_that_is_none_is_refused(make_model_folder: Make, value: object) -> None:
    folder = make_model_folder(model_info={"resolution": value})
    with pytest.raises(ModelArtifactError, match="__model_info__"):
        read_facts(folder)


def test_an_unknown_prediction_type_is_refused(make_model_folder: Make) -> None:
    with pytest.raises(ModelArtifactError, match="prediction_type 'x0'"):
        read_facts(make_model_folder(prediction_type="x0"))


def test_a_model_without_a_target_to_train_on_is_refused_unless_it_is_to_draw(
    make_model_folder: Make,
) -> None:
    folder = make_model_folder(prediction_type="sample")
    with pytest.raises(ModelArtifactError, match="'epsilon' or 'v_prediction' can be trained"):
        read_facts(folder)
    assert read_facts(folder, to_train=False).prediction_type == "sample"


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("vae/config.json", {"latent_channels": "four"}),
        ("vae/config.json", {"latent_channels": 10**9}),
        ("vae/config.json", {"scaling_factor": "0.18215"}),
        ("text_encoder/config.json", {"eos_token_id": [2]}),
        ("text_encoder/config.json", {"eos_token_id": None}),
        ("text_encoder/config.json", {"eos_token_id": None, "model_type": "bert"}),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "other"}),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}),
        ("scheduler/scheduler_config.json", {"prediction_type": ["epsilon"]}),
        ("unet/config.json", {"sample_size": [64, 64]}),
        ("unet/config.json", {"sample_size": int("9" * 4000)}),
        ("unet/config.json", {"norm_num_groups": int("9" * 4000)}),
    ],
)
def test_odd_numbers_in_a_configuration_are_refused(
    make_model_folder: Make, file: str, values: dict[str, object]
) -> None:
    folder = make_model_folder()
    content = json.loads((folder / file).read_text("utf-8")) | values
    (folder / file).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelArtifactError, match=file):
        read_facts(folder)


def test_facts_need_no_heavy_import(small_model_folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dreambooth.model_folder import source;"
        f"source.read_facts(Path({str(small_model_folder)!r}));"
        "heavy = {'torch', 'PIL', 'diffusers', 'huggingface_hub'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
