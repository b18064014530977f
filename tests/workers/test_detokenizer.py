import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster.errors import InvalidModel
from cluster.request import SamplingParams
from workers.engines.detokenizer import Detokenizer, Shown, StopStrings

PROSE = ["The manta ray glides over the reef, and the reef shines.", "naïve café 東京 🌊🐟 été", "a  b\n\n\tc"] * 3


def byte_level(prefix_space: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(PROSE, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("東 京", special=False), AddedToken("Ġx", special=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁reef", "s", "é", "▁▁"]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


TOKENIZER = byte_level()
EOS = frozenset({TOKENIZER.token_to_id("<|end|>")})
ids = st.lists(st.integers(0, TOKENIZER.get_vocab_size() + 3), max_size=40)
texts = st.lists(st.sampled_from([*PROSE, " ", "\n", "ee", "🌊", "é", "�"]), max_size=4).map("".join)
stop_sets = st.lists(st.text("aef h🌊é�", min_size=1, max_size=4), max_size=4).map(tuple)


def sampling(**fields) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1000} | fields)


def shown(tokenizer: Tokenizer, tokens: list[int], eos_ids=frozenset(), **fields) -> list[Shown]:
    """Up to and with the one that finishes."""
    detokenizer = Detokenizer(tokenizer, sampling(**fields), eos_ids)
    events = []
    for token in tokens:
        events.append(detokenizer.add(token))
        if events[-1].finish:
            break
    return events


def text_of(events: list[Shown]) -> str:
    return "".join(event.text for event in events)


def first_stop(text: str, stops: tuple[str, ...]) -> str | None:
    """What is shown before the first stop string to be complete, the longest of those; None if there is none."""
    for end in range(1, len(text) + 1):
        found = max((stop for stop in stops if text[:end].endswith(stop)), key=len, default=None)
        if found is not None:
            return text[: end - len(found)]
    return None


@pytest.mark.parametrize("prefix_space", [False, True])
@given(st.data())
def test_shown_text_is_what_the_tokenizer_decodes(prefix_space, data):
    tokenizer = byte_level(prefix_space) if prefix_space else TOKENIZER
    tokens = data.draw(ids.filter(bool) | texts.filter(bool).map(lambda text: tokenizer.encode(text).ids))
    assert text_of(shown(tokenizer, tokens, max_tokens=len(tokens))) == tokenizer.decode(tokens)


@given(
    st.lists(st.sampled_from(["<unk>", "</s>", "▁", "▁the", "▁reef", "s", "é", "▁▁", "🌊", "\n", "东"]), min_size=1, max_size=12)
)
def test_byte_fallback_text_is_what_the_tokenizer_decodes(pieces):
    tokenizer = byte_fallback()
    tokens = []
    for piece in pieces:
        known = tokenizer.token_to_id(piece)
        tokens += [known] if known is not None else [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in piece.encode()]
    assert text_of(shown(tokenizer, tokens, max_tokens=len(tokens))) == tokenizer.decode(tokens)


@given(ids, stop_sets, st.integers(0, 10), st.data())
def test_replayed_tokens_leave_the_state_of_added_ones(tokens, stops, min_tokens, data):
    params = {"stop": stops, "min_tokens": min_tokens}
    events = shown(TOKENIZER, tokens, EOS, **params)
    kept = data.draw(st.integers(0, max(0, len(events) - 1)))
    resumed = Detokenizer(TOKENIZER, sampling(**params), EOS, tokens[:kept])
    assert [resumed.add(token) for token in tokens[kept : len(events)]] == events[kept:]


@settings(max_examples=300)
@given(texts.filter(bool) | ids.filter(bool).map(TOKENIZER.decode).filter(bool), stop_sets)
def test_stop_strings_end_the_text_where_a_plain_search_finds_them(text, stops):
    tokens = TOKENIZER.encode(text).ids
    events = shown(TOKENIZER, tokens, max_tokens=len(tokens), stop=stops)
    expected = first_stop(TOKENIZER.decode(tokens), stops)
    assert text_of(events) == (TOKENIZER.decode(tokens) if expected is None else expected)
    assert events[-1].finish == ("length" if expected is None else "stop")
    if expected is not None:
        assert events[-1].stop_reason in stops


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4), st.data())
def test_stop_strings_do_not_depend_on_where_the_text_is_cut(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    search, seen, stop = StopStrings(stops), "", None
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        piece, stop = search.feed(text[start:end], True)
        seen += piece
        if stop is not None:
            break
    expected = first_stop(text, tuple(stops))
    assert (seen if stop is not None else seen + search.held) == (text if expected is None else expected)
    assert (stop is None) == (expected is None)


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4))
def test_held_text_is_the_longest_that_may_begin_a_stop_string(text, stops):
    search = StopStrings(stops)
    seen = "".join(search.feed(character, False)[0] for character in text)
    begins = [
        text[start:] for start in range(len(text)) if any(stop != text[start:] and stop.startswith(text[start:]) for stop in stops)
    ]
    assert (seen, search.held) == (text.removesuffix(begins[0]) if begins else text, begins[0] if begins else "")


def test_half_a_character_waits_and_then_shows_whole():
    tokens = [TOKENIZER.token_to_id(piece) for piece in ("ð", "Ł", "Į", "Ĭ")]
    assert [event.text for event in shown(TOKENIZER, tokens)] == ["", "", "", "🌊"]


def test_what_never_becomes_a_character_shows_at_the_end():
    assert text_of(shown(TOKENIZER, [TOKENIZER.token_to_id("ð")], max_tokens=1)) == "�"


def test_held_text_is_shown_when_the_text_ends_otherwise():
    tokens = TOKENIZER.encode("the reef").ids
    events = shown(TOKENIZER, [*tokens, *EOS], EOS, stop=("reef, ",))
    assert (text_of(events), events[-1].finish, events[-1].stop_reason) == ("the reef", "stop", None)


def test_a_stop_string_may_span_tokens_and_is_never_shown():
    tokens = [TOKENIZER.token_to_id(character) for character in "xabcabdz"]
    events = shown(TOKENIZER, tokens, stop=("abd",))
    assert [event.text for event in events] == ["x", "", "", "abc", "", "", ""]
    assert (events[-1].finish, events[-1].stop_reason) == ("stop", "abd")


def test_stop_strings_count_from_min_tokens_on():
    tokens = [TOKENIZER.token_to_id(character) for character in "abcabc"]
    assert text_of(shown(TOKENIZER, tokens, stop=("bc",), min_tokens=4)) == "abca"
    assert text_of(shown(TOKENIZER, tokens, stop=("bc",), min_tokens=3)) == "a"


def test_a_stop_id_ends_the_text_and_is_not_part_of_it():
    a, b = TOKENIZER.token_to_id("a"), TOKENIZER.token_to_id("b")
    events = shown(TOKENIZER, [a, b, a], EOS, stop_token_ids=(b,))
    assert [(event.text, event.finish, event.stop_reason) for event in events] == [("a", None, None), ("", "stop", b)]


def test_ignored_end_of_text_goes_on_to_the_bound():
    (end,) = EOS
    events = shown(TOKENIZER, [end, end, end], EOS, ignore_eos=True, max_tokens=3)
    assert [event.finish for event in events] == [None, None, "length"]


def test_a_token_alone_is_shown_with_its_name():
    (end,) = EOS
    tokens = [TOKENIZER.token_to_id("Ġ"), TOKENIZER.token_to_id("ð"), end, 9999]
    assert [event.token_text for event in shown(TOKENIZER, tokens)] == [" ", "�", "<|end|>", ""]


def test_other_kinds_of_tokenizer_are_refused_by_name():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(InvalidModel, match="WordPiece is neither"):
        Detokenizer(tokenizer, sampling(), frozenset())
