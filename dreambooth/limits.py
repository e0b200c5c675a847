"""Every cap on untrusted input, in one frozen dataclass.

The defaults leave generous room above what real data sets and Stable Diffusion models need; a
test or an operator may pass a changed copy (``dataclasses.replace(LIMITS, ...)``).
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Caps on what a job or a request may bring; units stand in the names."""

    # Pictures. A 100-megapixel camera makes the largest honest photographs; decoded as RGB they
    # take 3 bytes per pixel.
    max_image_pixels: int = 120_000_000
    # 16-bit TIFFs of such cameras come to about 600 MB on disk.
    max_image_file_bytes: int = 1 * GIB
    # The longest side: narrow strips make huge pictures once the short side is resized.
    max_image_side_pixels: int = 50_000
    # A print profile's tables come to some 2 MB, the largest to 9; others are a few hundred bytes.
    max_colour_profile_bytes: int = 16 * MIB
    # DreamBooth wants 4 to 20; above this it is the wrong folder.
    max_instance_images: int = 10_000
    # Class images are a few per instance image, a thousand in the paper's largest runs.
    max_class_images: int = 100_000
    # A walk through a wrong folder (a home directory, a disk) must end.
    max_folder_entries: int = 1_000_000

    # Texts. CLIP reads 77 tokens, some 400 characters; longer prompts are cut there anyway.
    max_prompt_characters: int = 4_000
    # Two prompts and a little room.
    max_dataset_info_bytes: int = 1 * MIB
    # SageMaker allows 100 hyperparameters of 256 + 2,500 characters: under 300 KiB, even escaped 6x
    # (\uXXXX) it stays below this.
    max_hyperparameters_bytes: int = 4 * MIB
    # One value as SageMaker's API caps it is 2,500 characters; local runs may pass longer prompts.
    max_hyperparameter_characters: int = 20_000

    # Pictures to draw. At 4,096 x 1,024 or 2,048 x 2,048 decoding one takes some 16 GB in fp32; a
    # mistyped size must not take the whole machine's memory.
    max_generated_side_pixels: int = 4_096
    # Of one picture; also the square of the largest side that training knows.
    max_generated_pixels: int = 4_194_304
    # Either sign. Pictures fall apart far below; numbers that float32 cannot hold lie above.
    max_guidance_scale: float = 1_000_000.0
    # Pictures in one U-Net call: far beyond what fills any GPU.
    max_generated_batch: int = 256

    # Requests to the server. Sixty-four prompts of a thousand characters, each with its negative
    # prompt and all of it escaped (\uXXXX), stay below this.
    max_body_bytes: int = 1 * MIB
    # Prompts x num_images_per_prompt. In the minute that a request may last an A100 draws some
    # seventy pictures of 50 steps.
    max_request_pictures: int = 64
    # Objects, lists and what they hold; sixty-four prompts, their negative prompts and all keys
    # come to some 150.
    max_json_values: int = 1_000
    # Objects and lists within each other; the deepest honest request has three.
    max_json_depth: int = 16
    # Of one number in JSON; 2**64 - 1 has 20 digits, a printed double at most 24 characters, and
    # transformers' word for "no limit" 31.
    max_json_number_characters: int = 100

    # Archives. Stable Diffusion 2.1 in fp32 is 5.2 GB, with a safety checker, fp16 copies and a
    # single-file twin about 16 GB.
    archive_max_bytes: int = 40 * GIB
    # A diffusers folder has about 30 files; refusing a flood of tiny ones must take no time.
    archive_max_members: int = 2_000
    # Bytes written per byte read. Weights compress by 1.1 at best, JSON and vocabularies by 20;
    # gzip reaches 1,000 only on bombs.
    archive_max_ratio: float = 100.0
    # Zeros in small archives may compress well; the ratio counts only from here on.
    archive_ratio_free_bytes: int = 16 * MIB
    # A whole path inside the archive; ext4 allows 4,096 with the destination in front.
    archive_max_name_bytes: int = 1_024
    # Folders within folders; diffusers needs two.
    archive_max_depth: int = 16
    # Long-name and pax headers are read into memory whole.
    archive_max_header_bytes: int = 1 * MIB

    # Model folders. The largest honest JSON is tokenizer.json: 4 MB of CLIP, 17 of XLM-RoBERTa.
    max_config_bytes: int = 32 * MIB
    # A whole pipeline in one file has some 300 KB of header; the library refuses 100 MB.
    max_safetensors_header_bytes: int = 16 * MIB
    # Of a tensor; the convolutions of these networks have four.
    max_tensor_rank: int = 8
    # Weight files of one component; sharded U-Nets have a handful.
    max_weight_files: int = 256


LIMITS = Limits()
