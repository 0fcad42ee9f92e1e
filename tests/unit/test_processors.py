"""Processors: bytes as tokens, images as arrays, and what is checked of them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from perdure.errors import BadInput
from perdure.processors import (
    ByteTokenizer,
    ImageProcessor,
    check_tokenizer,
    encode_image,
    encode_texts,
    image_processor_of,
    pad_id,
    position_limit,
    to_rgb,
    tokenizer_of,
)


def picture(height=4, width=6, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8)


# ---- text
@pytest.mark.parametrize("text", ["", "plain", "größer 😀\n", "\x00\x7f"])
def test_bytes_go_round(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids[0] == 257 and ids[1:] == list(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode([257, 65, 258, 256]) == "<bos>A<eos><pad>"
    assert tokenizer.batch_decode(torch.tensor([ids]), skip_special_tokens=True) == [text]


def test_call_as_a_tokenizer():
    tokenizer = ByteTokenizer(model_max_length=3)
    assert tokenizer("ab") == {"input_ids": [257, 97, 98], "attention_mask": [1, 1, 1]}
    out = tokenizer(["abcd", ""], padding=True, truncation=True)
    assert out == {"input_ids": [[257, 97, 98], [257, 256, 256]], "attention_mask": [[1, 1, 1], [1, 0, 0]]}
    assert tokenizer.decode([0xE2, 0x82]) == "\ufffd"
    assert len(tokenizer) == 259 and pad_id(tokenizer) == 256


def test_encode_texts_cuts_and_does_not_pad():
    tokenizer = ByteTokenizer()
    assert encode_texts(tokenizer, ["abcdef", "x"], 4) == [[257, 97, 98, 99], [257, 120]]
    assert encode_texts(tokenizer, ["ab"], special=False) == [[97, 98]]
    assert encode_texts(tokenizer, []) == []


def test_tokenizer_is_saved_and_damage_is_named(tmp_path):
    ByteTokenizer(model_max_length=12).save_pretrained(tmp_path)
    assert ByteTokenizer.from_pretrained(tmp_path).model_max_length == 12
    (tmp_path / "byte_tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(BadInput, match="byte_tokenizer.json.*not JSON"):
        ByteTokenizer.from_pretrained(tmp_path)
    with pytest.raises(BadInput, match="no such file"):
        ByteTokenizer.from_pretrained(tmp_path / "nowhere")


def test_tokenizer_that_does_not_fit_is_refused_with_both_numbers():
    def model(rows):
        return SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(rows, 2))

    check_tokenizer(ByteTokenizer(), model(259))
    check_tokenizer(ByteTokenizer(), model(300))
    with pytest.raises(BadInput, match="259 tokens.*258 embedding rows"):
        check_tokenizer(ByteTokenizer(), model(258))


def test_parts_of_a_processor():
    tokenizer, images = ByteTokenizer(), ImageProcessor((2, 2))
    both = SimpleNamespace(tokenizer=tokenizer, image_processor=images)
    assert tokenizer_of(both) is tokenizer_of(tokenizer) is tokenizer
    assert image_processor_of(both) is image_processor_of(images) is images
    with pytest.raises(BadInput, match="need a tokenizer, found ImageProcessor"):
        tokenizer_of(images)
    with pytest.raises(BadInput, match="need an image processor, found ByteTokenizer"):
        image_processor_of(tokenizer)
    with pytest.raises(BadInput, match="NoneType"):
        tokenizer_of(None)


def test_position_limits():
    limit = {"max_position_embeddings": 64}
    assert position_limit(SimpleNamespace(config=SimpleNamespace(model_type="bert", **limit))) == 64
    assert position_limit(SimpleNamespace(config=SimpleNamespace(model_type="roberta", **limit))) == 62
    rope = SimpleNamespace(model_type="llama", rope_parameters={"rope_type": "default"}, **limit)
    assert position_limit(SimpleNamespace(config=rope)) is None


# ---- images
def test_image_of_the_right_size_is_scaled_and_normalised():
    image = picture()
    out = ImageProcessor((4, 6), mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))(image)
    assert out.shape == (3, 4, 6) and out.dtype == np.float32
    expected = (image.transpose(2, 0, 1) / 255 - np.array([0.1, 0.2, 0.3])[:, None, None]) / np.array([0.5, 1, 2])[
        :, None, None
    ]
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_grey_and_alpha_and_pillow():
    grey, rgba = picture(channels=1), picture(channels=4)
    assert np.array_equal(to_rgb(grey), to_rgb(grey[:, :, 0]))
    assert np.array_equal(to_rgb(grey)[:, :, 2], grey[:, :, 0])
    assert np.array_equal(to_rgb(rgba), rgba[:, :, :3])
    assert np.array_equal(to_rgb(Image.fromarray(picture())), picture())
    for wrong in (
        picture().astype(np.float32),
        picture(channels=2),
        np.zeros((0, 2, 3), np.uint8),
        np.zeros(3, np.uint8),
    ):
        with pytest.raises(BadInput, match="image: expected"):
            to_rgb(wrong)


def test_resizing_is_pillows():
    image = picture(8, 10)
    raw = ImageProcessor((4, 6), (0, 0, 0), (1, 1, 1), resample=3)(image)
    expected = np.asarray(Image.fromarray(image).resize((6, 4), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(raw, expected, atol=1e-6)


def test_shortest_edge_keeps_proportions_and_cuts_the_centre():
    image = picture(8, 16)
    raw = ImageProcessor((4, 4), (0, 0, 0), (1, 1, 1), shortest_edge=4)(image)
    whole = np.asarray(Image.fromarray(image).resize((8, 4), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(raw, whole[:, 2:6].transpose(2, 0, 1) / 255, atol=1e-6)
    small = ImageProcessor((6, 6), (0, 0, 0), (1, 1, 1), shortest_edge=4)(picture(4, 4))
    assert small.shape == (3, 6, 6) and not small[:, 0].any() and small[:, 1:5, 1:5].any()


def test_settings_go_round_through_a_folder(tmp_path):
    for processor in (
        ImageProcessor((4, 6), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), resample=3),
        ImageProcessor((4, 4), shortest_edge=5),
    ):
        processor.save_pretrained(tmp_path)
        again = ImageProcessor.from_pretrained(tmp_path)
        assert again.to_dict() == processor.to_dict()
        image = picture(9, 7)
        assert np.array_equal(again(image), processor(image))


def test_settings_of_hugging_face_processors():
    vit = {"size": 8, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    assert ImageProcessor.from_preprocessor_config(vit).size == (8, 8)
    clip = {"size": {"shortest_edge": 9}, "do_center_crop": True, "crop_size": {"height": 8, "width": 8}, "resample": 3}
    read = ImageProcessor.from_preprocessor_config(clip)
    assert (read.size, read.shortest_edge, read.resample) == ((8, 8), 9, 3)
    plain = ImageProcessor.from_preprocessor_config(vit | {"do_normalize": False})
    assert np.allclose(plain(picture(8, 8)), picture(8, 8).transpose(2, 0, 1) / 255)
    with pytest.raises(BadInput, match="rescale_factor"):
        ImageProcessor.from_preprocessor_config(vit | {"rescale_factor": 1 / 127.5})
    with pytest.raises(BadInput, match="size: found None"):
        ImageProcessor.from_preprocessor_config({})


def test_settings_from_model_configurations():
    from transformers import CLIPConfig, GPT2Config, ViTConfig

    vit = ImageProcessor.from_model_config(ViTConfig(image_size=16))
    assert vit.size == (16, 16) and vit.mean == (0.5, 0.5, 0.5) and vit.shortest_edge is None
    clip = ImageProcessor.from_model_config(CLIPConfig(vision_config={"image_size": 24}))
    assert clip.size == (24, 24) and clip.mean[0] == 0.48145466 and clip.shortest_edge == 24
    with pytest.raises(BadInput, match="'gpt2' has no image_size"):
        ImageProcessor.from_model_config(GPT2Config())


def test_foreign_image_processors_are_called_by_their_names():
    def foreign(images, return_tensors):
        assert return_tensors == "np"
        return {"pixel_values": [images.transpose(2, 0, 1) / 2]}

    out = encode_image(foreign, picture())
    assert out.dtype == np.float32 and np.array_equal(out, (picture().transpose(2, 0, 1) / 2).astype(np.float32))


def test_missing_file_of_settings_is_json_checked(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps([1]), encoding="utf-8")
    with pytest.raises(BadInput, match="expected a JSON object"):
        ImageProcessor.from_pretrained(tmp_path)
