"""Every cap on untrusted input, in one frozen dataclass.

The defaults leave generous room above what real data sets and Stable Diffusion models need; a
test or an operator may pass a changed copy (``dataclasses.replace(LIMITS, ...)``).
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


def size_in_words(count: int) -> str:
    """Return a number of bytes for a reader: in GiB, or in MiB below a tenth of a GiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / MIB:.1f} MiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Caps on what a job or a request may contain; the names state the units."""

    # Pictures. A 100-megapixel camera takes the largest real photographs; decoded as RGB they need
    # 3 bytes per pixel.
    max_image_pixels: int = 120_000_000
    # 16-bit TIFFs of such cameras come to about 600 MB on disk.
    max_image_file_bytes: int = 1 * GIB
    # The longest side: narrow strips make huge pictures once the short side is resized.
    max_image_side_pixels: int = 50_000
    # Profiles for print take about 2 MB, the largest 9 MB; others take a few hundred bytes.
    max_colour_profile_bytes: int = 16 * MIB
    # JPEG (ITU T.81, annex B): progressive encoders write about ten scans.
    max_jpeg_scans: int = 100
    # Scans x pixels: each scan is a pass over all of them, at 1.6e9 in a second. A progressive JPEG
    # of 120 megapixels has 1.2e9.
    max_jpeg_scan_pixels: int = 2_000_000_000
    # A colour profile of 16 MiB takes 256 segments.
    max_jpeg_segments: int = 1_024
    # Photoshop segments; real pictures have a few.
    max_jpeg_photoshop_segments: int = 64
    # Pillow skips what lies between segments byte by byte.
    max_jpeg_junk_bytes: int = 64 * KIB
    # Chunks of PNG and WebP; real texts and profiles take some dozens.
    max_picture_chunks: int = 4_096
    # Those of pixels may be more, of so many bytes on average; libpng writes 8 KiB.
    min_picture_chunk_bytes: int = 2 * KIB
    # Chunks of a PNG that hold no pixels: texts, profiles.
    max_png_other_chunks: int = 256
    # That of cameras takes some hundred kilobytes at most.
    max_exif_bytes: int = 1 * MIB
    # Blocks of up to 255 bytes in front of a GIF's first frame: texts and profiles.
    max_gif_blocks: int = 65_536
    # TIFF 6.0 defines about 80 tags, makers some hundreds.
    max_tiff_tags: int = 4_096
    # Numbers in one tag; a palette of 16 bits has 196,608.
    max_tiff_tag_numbers: int = 200_000
    # Strips or tiles, of which Pillow decodes some 130,000 in a second; one per line is at most
    # 50,000.
    max_tiff_strips: int = 100_000
    # Bytes of all strips per byte of the file; a few writers state their size before compression.
    max_tiff_ratio: int = 8
    # Pixels of all tiles beyond max_tiff_ratio times the picture's; honest tiles are 1,024 wide.
    max_tiff_tile_pixels: int = 2**24
    # Pillow decodes run-length encoded BMPs in Python: 3 MB in a second,
    max_rle_bytes: int = 2 * MIB
    # and some 13 megapixels.
    max_rle_pixels: int = 16_000_000
    # Subjects that one run teaches, and one model carries the prompts of. The literature has five.
    max_subjects: int = 16
    # DreamBooth needs 4 to 20; a folder with more than this many is the wrong one.
    max_instance_images: int = 10_000
    # Sent to the studio page for one run; a dropped folder of holiday pictures is refused early.
    max_uploaded_pictures: int = 100
    # Class images are a few per instance image, a thousand in the paper's largest runs.
    max_class_images: int = 100_000
    # Different captions of one subject's pictures. Each is encoded once: 0.2 MB of text embeddings.
    max_captions: int = 1_000
    # A file of captions, of some 100 characters for each of as many pictures.
    max_captions_bytes: int = 4 * MIB
    # Listing a wrong folder (a home directory, a disk) must come to an end.
    max_folder_entries: int = 1_000_000

    # Texts. CLIP reads 77 tokens, some 400 characters; longer prompts are cut there anyway.
    max_prompt_characters: int = 4_000
    # Two prompts and a little room.
    max_dataset_info_bytes: int = 1 * MIB
    # SageMaker allows 100 hyperparameters of 256 + 2,500 characters: that is under 300 KiB,
    # and below this cap even if every character is escaped (\uXXXX, 6x).
    max_hyperparameters_bytes: int = 4 * MIB
    # SageMaker's API allows 2,500 characters per value; local runs may pass longer prompts.
    max_hyperparameter_characters: int = 20_000

    # Pictures to draw. At 4,096 x 1,024 or 2,048 x 2,048 decoding one takes some 16 GB in fp32; a
    # mistyped size must not take the whole machine's memory.
    max_generated_side_pixels: int = 4_096
    # Per picture; also the square of the largest training resolution, 2,048.
    max_generated_pixels: int = 4_194_304
    # Of either sign. Pictures degrade far below it; numbers beyond float32 lie above it.
    max_guidance_scale: float = 1_000_000.0
    # Pictures in one U-Net call: far beyond what fills any GPU.
    max_generated_batch: int = 256

    # Requests to the server. Sixty-four prompts of a thousand characters, each with its negative
    # prompt and all of it escaped (\uXXXX), stay below this.
    max_body_bytes: int = 1 * MIB
    # Prompts x num_images_per_prompt. A request may last one minute, in which an A100 draws about
    # seventy pictures of 50 steps.
    max_request_pictures: int = 64
    # Objects, lists and their items; sixty-four prompts, their negative prompts and all keys make
    # about 150.
    max_json_values: int = 1_000
    # Levels of nested objects and lists; the deepest valid request has three.
    max_json_depth: int = 16
    # Of one number in JSON; 2**64 - 1 has 20 digits, a printed double at most 24 characters, and
    # the number that transformers writes for "no limit" 31.
    max_json_number_characters: int = 100

    # Archives. Stable Diffusion 2.1 in fp32 is 5.2 GB, with a safety checker, fp16 copies and a
    # single-file copy about 16 GB.
    archive_max_bytes: int = 40 * GIB
    # A diffusers folder has about 30 files; an archive of countless tiny ones is refused early.
    archive_max_members: int = 2_000
    # Bytes written per byte read. Weights compress by 1.1 at best, JSON and vocabularies by 20;
    # gzip reaches 1,000 only on bombs.
    archive_max_ratio: float = 100.0
    # Small archives may hold zeros, which compress well; the ratio is checked only above this size.
    archive_ratio_free_bytes: int = 16 * MIB
    # The whole path of a member; Linux allows 4,096 bytes with the destination in front.
    archive_max_name_bytes: int = 1_024
    # Levels of nested folders; diffusers needs two.
    archive_max_depth: int = 16
    # Long-name and pax headers are read into memory whole.
    archive_max_header_bytes: int = 1 * MIB

    # Model folders. The largest real JSON is tokenizer.json: 4 MB for CLIP, 17 for XLM-RoBERTa.
    max_config_bytes: int = 32 * MIB
    # A whole pipeline in one file has a header of about 300 KB; the library refuses 100 MB.
    max_safetensors_header_bytes: int = 16 * MIB
    # The settings of a single-file checkpoint, in a .yaml beside it: 2 KB.
    max_sidecar_bytes: int = 64 * KIB
    # Levels of it; those of the published models have five. The parser's time grows with their
    # square.
    max_sidecar_depth: int = 16
    # A whole pipeline in one file, with moving averages, has about 1,900.
    max_tensors: int = 20_000
    # Dimensions of a tensor; the convolutions of these networks have four.
    max_tensor_rank: int = 8
    # Weight files of one component; sharded U-Nets have a handful.
    max_weight_files: int = 256


LIMITS = Limits()
