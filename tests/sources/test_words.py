"""Words of texts: what white space divides, and pairs of letters in scripts without spaces; near-duplicates by them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effbench.sources.duplicates import Signatures, count_shared, jaccard
from effbench.sources.words import is_unspaced, list_words

SPACED = [
    "LATIN",
    "aé ßſ\u0301",
    "ΑΩω",
    "Жя",
    "אב",
    "ابت\u064e",
    "हिन्दी",
    "தமிழ்",
    "한국어ㅋ",
    "ＡＢ",
    "አማርኛ",
    "1२४",
    "👍🏽€«»…。、「」-'_#",
]
SPACE = " \t\n\r\x0b\x1c\x85\xa0\u2003\u2028\u3000"
LETTERS = "".join(chr(code) for code in range(0x4E00, 0x4E00 + 600))


def write(chance: random.Random, length: int) -> str:
    """A text of ideographs, some of which are as frequent as those of real texts."""
    return "".join(chance.choices(LETTERS, [1 / (5 + rank) for rank in range(len(LETTERS))], k=length))


def change(text: str, number: int, chance: random.Random) -> str:
    """The text with so many letters in a row replaced."""
    place = chance.randrange(len(text) - number)
    return text[:place] + write(chance, number) + text[place + number :]


@given(st.text(alphabet="".join(SPACED) + SPACE))
def test_where_there_are_spaces_they_alone_divide(text: str) -> None:
    assert list_words(text) == text.split() and not any(map(is_unspaced, list_words(text)))


@given(st.text(alphabet="".join(SPACED) + SPACE + "中文字々かなカナーไทยที่ກຂកខခဂ"))
def test_nothing_is_lost_but_white_space_and_order_stays(text: str) -> None:
    place, words = 0, list_words(text)
    for word in words:
        place = text.find(word, place)
        assert word and place >= 0
    assert set("".join(words)) == set("".join(text.split()))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("我喜欢学习", "我喜 喜欢 欢学 学习"),
        ("你好，世界。", "你好 ， 世界 。"),
        ("你好， 世界\n。", "你好 ， 世界 。"),
        ("我用Python写代码", "我用 Python 写代 代码"),
        ("The word 猫 means cat.", "The word 猫 means cat."),
        ("第3章", "第 3 章"),
        ("人々へのスーパー", "人々 々へ への のス スー ーパ パー"),
        ("ภาษาไทย ที่นี่", "ภา าษ ษา าไ ไท ทย ที่นี่"),
        ("ສະບາຍ", "ສະ ະບ ບາ າຍ"),
        ("ភាសា", "ភាសា"),
        ("မြန်မာ", "မြန် န်မာ"),
        ("大韓民國은 크다", "大韓 韓民 民國 은 크다"),
        ("ㅋㅋㅋ ＡＢＣ", "ㅋㅋㅋ ＡＢＣ"),
        ("𠀀𠀁𠀂", "𠀀𠀁 𠀁𠀂"),
        ("", ""),
    ],
)
def test_letters_of_scripts_without_spaces_are_paired(text: str, words: str) -> None:
    assert list_words(text) == words.split()


def test_near_duplicates_without_spaces_are_counted_and_others_are_not() -> None:
    chance = random.Random(0)
    texts = [write(chance, 400) for _ in range(30)]
    near = [change(text, 20, chance) for text in texts[:7]]
    assert count_shared(near, texts) == 7 and count_shared(texts, near) == 7
    assert count_shared([change(text, 200, chance) for text in texts[:7]], texts) == 0
    # Long texts of one language have the same letters, whatever they say: what is compared is pairs of them.
    long = [write(chance, 6000) for _ in range(6)]
    assert min(jaccard(set(one), set(other)) for one in long for other in long) > 0.9
    assert (
        count_shared(long[:3], long[3:]) == 0
        and count_shared(long[:3], [change(text, 600, chance) for text in long]) == 3
    )


def test_shingles_of_a_text_without_spaces_are_many_and_those_of_another_are_others() -> None:
    chance = random.Random(1)
    signatures = Signatures()
    one, other = write(chance, 300), write(chance, 300)
    grams = [signatures.shingle(list_words(text)) for text in (one, change(one, 12, chance), other)]
    assert len(grams[0]) > 280 and jaccard(*grams[:2]) > 0.8 and jaccard(grams[0], grams[2]) == 0
