from __future__ import annotations

from dreambooth.model_folder.facts import ModelFacts
from dreambooth.settings.hyperparameters import Hyperparameters
from dreambooth.training import disk
from dreambooth.training.disk import DiskBudget

UNET, TEXT, VAE = 865_910_724, 340_387_840, 83_653_863
FULL_SIZE = ModelFacts(  # Stable Diffusion 2.1 base
    prediction_type="epsilon",
    resolution=512,
    latent_channels=4,
    vae_scale_factor=8,
    unet_layer_elements=1,
    unet_parameters=UNET,
    text_encoder_parameters=TEXT,
    vae_parameters=VAE,
)


def budget(
    *,
    class_images: int = 0,
    eight_bit: bool = False,
    keeps: bool = False,
    base: int = 0,
    copied: int = 0,
    **changes: object,
) -> DiskBudget:
    return disk.expected(
        Hyperparameters(**changes),  # type: ignore[arg-type]
        FULL_SIZE,
        class_images=class_images,
        use_8bit_adam=eight_bit,
        keeps_checkpoints=keeps,
        base_bytes=base,
        copied_bytes=copied,
    )


def test_the_model_counts_every_weight_in_the_precision_of_the_export() -> None:
    model = 4 * (UNET + TEXT + VAE)
    assert budget().model == model
    assert budget(export_precision="fp16").model == model // 2
    assert budget(copied=1000).model == model + 1000


def test_one_file_takes_as_much_as_the_model_again() -> None:
    assert budget().single_file == 0
    whole = budget(export_single_file=True, export_precision="fp16", copied=1000)
    assert whole.single_file == 2 * (UNET + TEXT + VAE) == whole.model - 1000
    assert whole.total == whole.model + whole.single_file + disk.REST_BYTES


def test_checkpoints_hold_weights_and_moments_and_one_more_than_is_kept() -> None:
    assert budget().all_checkpoints == 0
    kept = budget(keeps=True, checkpoints_total_limit=2)
    assert (kept.checkpoint, kept.checkpoints) == (12 * UNET, 3)
    assert kept.all_checkpoints == 3 * 12 * UNET
    assert budget(keeps=True, eight_bit=True).checkpoint == 6 * UNET
    assert budget(keeps=True, train_text_encoder=True).checkpoint == 12 * (UNET + TEXT)


def test_the_total_is_the_sum() -> None:
    whole = budget(keeps=True, class_images=10, base=77)
    assert whole.class_images == 10 * 2 * 512 * 512
    assert whole.total == whole.model + 24 * UNET + whole.class_images + 77 + disk.REST_BYTES


def test_of_an_unknown_model_only_the_base_is_known() -> None:
    unknown = disk.expected(
        Hyperparameters(),
        None,
        class_images=5,
        use_8bit_adam=False,
        keeps_checkpoints=True,
        base_bytes=9,
    )
    assert unknown == DiskBudget(base=9)
