"""The catalog says what a plain count of the teacher's activations says, whatever is read at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cocomix import InputError
from cocomix.catalog import building as catalog_module
from cocomix.catalog.activity import ConceptActivity, Firings
from cocomix.catalog.building import CatalogConfig, build_catalog, token_effects
from cocomix.catalog.rows import CATALOG_FILE, INFO_FILE, SCHEMA, CatalogInfo, Concept, Context, write_rows
from cocomix.catalog.search import Catalog, Hit, describe, hits_table, open_catalog, search_catalog, show_concept
from cocomix.common import files
from cocomix.concepts.reading import Passages, SameTokens, TeacherReader
from cocomix.concepts.sae import SparseAutoencoder
from cocomix.concepts.teacher import residual_stream
from cocomix.data.pieces import decode_around
from cocomix.data.tokenizer import encode_documents, train_tokenizer, vocabulary_size

NUM_CONCEPTS, BLOCK, LAYER = 60, 24, 1
TEXTS = [
    "The fire burned the old house down, and the wind carried its smoke over the hill.",
    "Das Käsebrötchen schmeckt süß – größer als 北京 und voller Gefühl 🙂🙂.",
    "A small boat drifts on the quiet lake while rain falls.\nNobody speaks.",
    "she said that the house by the lake was old, and that no wind came over the hill",
] * 3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS[:1] + TEXTS[2:4], 300)  # signs outside ASCII stay several tokens


@pytest.fixture(params=["gpt2", "llama"])
def teacher(request, random_teacher, tokenizer) -> PreTrainedModel:
    return random_teacher(request.param, vocab_size=vocabulary_size(tokenizer) + 3)


@pytest.fixture
def sae() -> SparseAutoencoder:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    bias = draw(NUM_CONCEPTS) - 6
    bias[-1] = -1e3  # a concept that is never active
    return SparseAutoencoder(
        W_enc=draw(32, NUM_CONCEPTS), b_enc=bias, W_dec=draw(NUM_CONCEPTS, 32), b_dec=draw(32), k=6
    )


@pytest.fixture
def reader(tokenizer) -> SameTokens:
    ids = [token for text in encode_documents(tokenizer, TEXTS) for token in [*text, tokenizer.eos_token_id]]
    blocks = [ids[start : start + BLOCK] for start in range(0, len(ids) - BLOCK, BLOCK)]
    return SameTokens(Dataset.from_dict({"input_ids": blocks}), tokenizer)


class Padded:
    """Another tokenizer's reader: a document per block, a beginning of text before it, padding after it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self._ids = [[5, *ids[:60]] for ids in encode_documents(tokenizer, TEXTS)]

    def __len__(self) -> int:
        return len(self._ids)

    def __call__(self, start: int, stop: int) -> Passages:
        rows = self._ids[start:stop]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [7] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        documents = np.arange(start, stop)[:, None].repeat(longest, 1)
        documents[:, 0] = -1
        return Passages(ids, mask, None, documents)

    def source(self, document: int) -> str:
        return f"file {document}"


@pytest.fixture
def built(teacher, sae, tmp_path) -> Callable[..., Catalog]:
    """built(reader): its catalog."""

    def build(reader: TeacherReader, config: CatalogConfig | None = None, blocks_per_batch: int = 5) -> Catalog:
        counts = np.arange(sae.d_sae)
        build_catalog(
            teacher, sae, LAYER, reader, counts, 1000, config or CatalogConfig(4, 6, 3), blocks_per_batch, tmp_path
        )
        return open_catalog(tmp_path)

    return build


@pytest.fixture
def made(tmp_path) -> Callable[[list[Concept]], Catalog]:
    """made([concept(), …]): a catalog of just these, numbered in this order."""

    def make(concepts: list[Concept]) -> Catalog:
        rows = [dataclasses.asdict(concept) | {"concept_id": number} for number, concept in enumerate(concepts)]
        write_rows(tmp_path / CATALOG_FILE, [pa.Table.from_pylist(rows, schema=SCHEMA)])
        info = CatalogInfo(len(rows), "sae", len(rows), 100, 2, 100, 1, contexts=10, context_tokens=4)
        files.write_json(tmp_path / INFO_FILE, dataclasses.asdict(info))
        return open_catalog(tmp_path)

    return make


def plain(teacher: PreTrainedModel, sae: SparseAutoencoder, reader: TeacherReader) -> tuple[list[list], int]:
    """By loops: of each concept all (activation, block, position) in the order of the text, and the tokens."""
    found: list[list] = [[] for _ in range(sae.d_sae)]
    tokens = 0
    for block in range(len(reader)):
        passages = reader(block, block + 1)
        latents = sae.encode(residual_stream(teacher, passages.input_ids, LAYER, passages.attention_mask))
        for position in range(passages.input_ids.shape[1]):
            if passages.documents is not None and passages.documents[0, position] < 0:
                continue
            tokens += 1
            for value, index in zip(latents.values[0, position], latents.indices[0, position], strict=True):
                if value > 0:
                    found[index].append((float(value), block, position))
    return found, tokens


def plain_contexts(firings: list, n: int) -> list:
    """The strongest n of them, one per block."""
    best: dict[int, tuple] = {}
    for firing in firings:
        if firing[1] not in best or firing[0] > best[firing[1]][0]:
            best[firing[1]] = firing
    return sorted(best.values(), key=lambda firing: -firing[0])[:n]


@pytest.mark.parametrize("padded", [False, True])
def test_figures_and_places_are_those_of_a_plain_count(padded, built, teacher, sae, reader, tokenizer):
    reader = Padded(tokenizer) if padded else reader
    catalog = built(reader)
    found, tokens = plain(teacher, sae, reader)
    assert catalog.info.tokens == tokens
    assert catalog.info.active_concepts == sum(map(bool, found))
    for concept_id, firings in enumerate(found):
        concept = catalog.concept(concept_id)
        values = [value for value, _, _ in firings]
        assert concept.frequency == pytest.approx(len(firings) / tokens)
        assert concept.mean_activation == pytest.approx(np.mean(values) if values else 0, rel=1e-5)
        assert concept.max_activation == pytest.approx(max(values, default=0), rel=1e-5)
        assert (concept.label_count, concept.label_share) == (concept_id, concept_id / 1000)
        expected = plain_contexts(firings, 4)
        assert [(context.block, context.position) for context in concept.contexts] == [each[1:] for each in expected]
        strengths = [context.activation for context in concept.contexts]
        assert strengths == pytest.approx([each[0] for each in expected], rel=1e-5)
    assert catalog.concept(NUM_CONCEPTS - 1).contexts == []


def test_texts_around_places_are_those_of_their_document(built, reader, tokenizer):
    catalog = built(reader)
    end = tokenizer.eos_token_id
    seen = 0
    for concept_id in range(NUM_CONCEPTS):
        for context in catalog.concept(concept_id).contexts:
            ids = reader(context.block, context.block + 1).input_ids[0].tolist()
            at, first, last = context.position, context.position, context.position
            while first > max(0, at - 6) and ids[first - 1] != end:
                first -= 1
            while last < min(len(ids) - 1, at + 3) and ids[last] != end:
                last += 1
            shown = context.before + context.token + context.after
            whole = tokenizer.decode(ids[first : last + 1])
            assert shown in whole
            assert shown == whole or whole[0] == "\ufffd" or whole[-1] == "\ufffd"
            assert "\ufffd" not in context.before
            assert context.token
            if "\ufffd" not in tokenizer.decode([ids[at]]):
                assert context.token == tokenizer.decode([ids[at]])
            seen += 1
    assert seen > NUM_CONCEPTS


def test_no_context_reaches_into_a_document_beside_it(built, tokenizer):
    class Pairs(Padded):
        def __call__(self, start: int, stop: int) -> Passages:
            passages = super().__call__(start, stop)
            passages.documents[:, 9:] += 100
            return passages

    reader = Pairs(tokenizer)
    for concept_id in range(NUM_CONCEPTS):
        for context in built(reader).concept(concept_id).contexts if concept_id % 7 == 0 else []:
            ids = reader._ids[context.block]
            first = context.position < 9
            own = tokenizer.decode(ids[1:9] if first else ids[9:])
            assert context.before + context.token + context.after in own
            assert context.source == f"file {context.block + (0 if first else 100)}"


def assert_close(found: object, expected: object) -> None:
    """Equal, numbers to rounding."""
    if isinstance(found, dict | list):
        assert len(found) == len(expected)
        for key in found if isinstance(found, dict) else range(len(found)):
            assert_close(found[key], expected[key])
    else:
        assert found == (pytest.approx(expected, rel=1e-6) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("padded", [False, True])
def test_the_result_does_not_depend_on_what_is_read_at_once(padded, built, reader, tokenizer):
    reader = Padded(tokenizer) if padded else reader
    one, all_at_once = (built(reader, blocks_per_batch=blocks) for blocks in (1, len(reader)))
    for concept_id in range(NUM_CONCEPTS):
        assert_close(*(dataclasses.asdict(each.concept(concept_id)) for each in (one, all_at_once)))
    assert one.info == all_at_once.info


def test_of_equally_strong_places_the_earliest_stay(sae):
    draw = torch.Generator().manual_seed(3)
    blocks, tokens, concepts, n = 30, 12, 8, 4
    activation = torch.randint(0, 4, (blocks, tokens, concepts), generator=draw).float()
    found = [[] for _ in range(concepts)]
    for block, position, concept in activation.nonzero().tolist():
        found[concept].append((activation[block, position, concept].item(), block, position))
    for batch in (1, 7, blocks):
        activity = ConceptActivity(concepts, n, torch.device("cpu"))
        for start in range(0, blocks, batch):
            part = activation[start : start + batch]
            block, position, concept = part.nonzero(as_tuple=True)
            firings = Firings(concept, part[block, position, concept], block + start, position)
            activity.add(firings, part[..., 0].numel())
        for concept in range(concepts):
            places = torch.stack([activity.activation, activity.block, activity.position], -1)[concept].tolist()
            assert list(map(tuple, places)) == plain_contexts(found[concept], n)
        assert activity.tokens == blocks * tokens
        assert activity.count.tolist() == [len(each) for each in found]


def test_only_the_blocks_asked_for_are_read(built, reader):
    catalog = built(reader, CatalogConfig(4, 6, 3, max_blocks=2))
    assert (catalog.info.blocks, catalog.info.tokens) == (2, 2 * BLOCK)
    assert {context.block for i in range(NUM_CONCEPTS) for context in catalog.concept(i).contexts} == {0, 1}


# Characters of several tokens


def pieces_of(text: str, index: int) -> tuple[str, str, str]:
    """Of a text of one token per byte, around byte `index`."""
    return decode_around(lambda ids: bytes(ids).decode(errors="replace"), list(text.encode()), index)


@pytest.mark.parametrize("index", [2, 3, 4, 5])
def test_a_token_in_a_character_shows_the_whole_character(index):
    assert pieces_of("ab🙂c", index) == ("ab", "🙂", "c")


def test_characters_before_and_after_the_token_are_whole():
    assert pieces_of("ä🙂x🙂ä", 6) == ("ä🙂", "x", "🙂ä")


def test_a_character_that_the_window_cuts_is_left_out():
    ids = list("🙂ab🙂".encode())[2:-1]
    assert decode_around(lambda ids: bytes(ids).decode(errors="replace"), ids, 2) == ("", "a", "b")


def test_a_replacement_sign_in_the_text_is_kept():
    assert pieces_of("don\ufffdt go", 6) == ("don\ufffd", "t", " go")


def test_a_token_of_a_character_that_the_text_does_not_finish():
    ids = list("x🙂".encode())[:3]
    assert decode_around(lambda ids: bytes(ids).decode(errors="replace"), ids, 2) == ("x", "\ufffd", "")


# Tokens


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_effects_are_logits_of_the_direction_through_norm_and_unembedding(kind, random_teacher):
    teacher = random_teacher(kind)
    directions = torch.randn(7, 32, dtype=torch.float64)
    centered = directions - directions.mean(-1, keepdim=True) if kind == "gpt2" else directions
    gain = (teacher.transformer.ln_f if kind == "gpt2" else teacher.model.norm).weight
    unit = centered / centered.square().mean(-1, keepdim=True).sqrt()
    logits = (unit * gain) @ teacher.get_output_embeddings().weight[:50].T
    (effects,) = token_effects(teacher, directions * 1e-3, 5, 50)
    for found, largest in ((effects.promoted, True), (effects.suppressed, False)):
        expected = logits.topk(5, largest=largest)
        assert torch.equal(found.indices, expected.indices)
        torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-4)


def test_a_direction_of_zero_does_no_harm(random_teacher):
    (effects,) = token_effects(random_teacher("llama"), torch.zeros(1, 32), 5, 50)
    assert effects.promoted.values.tolist() == [[0.0] * 5]


def test_logits_stay_within_their_budget(random_teacher, monkeypatch):
    teacher, sizes = random_teacher("gpt2"), []
    linear = F.linear
    directions = torch.randn(40, 32, dtype=torch.float64)
    (whole,) = token_effects(teacher, directions, 5, 50)

    def recorded(*arguments: Tensor) -> Tensor:
        out = linear(*arguments)
        sizes.append(out.numel() * out.element_size())
        return out

    monkeypatch.setattr(catalog_module, "LOGITS_BUFFER_BYTES", 3 * 50 * 8 + 7)
    monkeypatch.setattr(catalog_module.F, "linear", recorded)
    parts = token_effects(teacher, directions, 5, 50)
    assert max(sizes) == 3 * 50 * 8
    assert len(sizes) == 14
    assert torch.equal(torch.cat([part.promoted.indices for part in parts]), whole.promoted.indices)


def test_promoted_tokens_and_first_names_are_words(built, reader, teacher, sae, tokenizer):
    concept = built(reader).concept(5)
    (effects,) = token_effects(teacher, sae.W_dec[5:6], 3, vocabulary_size(tokenizer))
    assert concept.promoted == [tokenizer.decode([token]) for token in effects.promoted.indices[0].tolist()]
    assert concept.suppressed_logits == pytest.approx(effects.suppressed.values[0].tolist(), rel=1e-5)
    assert concept.name
    assert concept.name_source == "promoted tokens"


# The file


def test_a_catalog_is_whole_or_absent(teacher, sae, reader, tmp_path, monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(catalog_module, "ROWS_PER_GROUP", 20)
    monkeypatch.setattr(pq.ParquetWriter, "write_table", fails)
    with pytest.raises(KeyboardInterrupt):
        build_catalog(teacher, sae, LAYER, reader, np.zeros(NUM_CONCEPTS, int), 1, CatalogConfig(), 4, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_written_in_groups(built, reader, tmp_path, monkeypatch):
    whole = built(reader).table
    monkeypatch.setattr(catalog_module, "ROWS_PER_GROUP", 25)
    assert built(reader).table.equals(whole)
    assert pq.ParquetFile(tmp_path / CATALOG_FILE).num_row_groups == 3


def test_no_catalog_and_damaged_ones_are_one_line(made, tmp_path):
    with pytest.raises(InputError, match=r"no concept catalog in .*: expected catalog.parquet and"):
        open_catalog(tmp_path / "nowhere")
    folder = made([concept()]).folder
    whole = (folder / CATALOG_FILE).read_bytes()
    (folder / CATALOG_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cannot open .*: ArrowInvalid: .*; build it again") as error:
        open_catalog(folder)
    assert "\n" not in str(error.value)
    (folder / CATALOG_FILE).write_bytes(whole)
    (folder / INFO_FILE).write_text('{"num_concepts": 3}')
    with pytest.raises(InputError, match=r"cannot open .*: TypeError"):
        open_catalog(folder)


# Search


def concept(name: str = "a · b · c", frequency: float = 0.01, **rest: object) -> Concept:
    """A concept of `made`."""
    plain = Concept(0, name, "promoted tokens", frequency, 1.5, 2.5, 7, 0.007, ["x"], [1.0], ["y"], [-1.0], [])
    return dataclasses.replace(plain, **rest)


def place(before: str, token: str, after: str) -> Context:
    return Context(before, token, after, 2.5, "a.txt", 3, 4)


FIRE = place("they lit a", " fire", " by the lake")
LAKE = place("a fire by the", " lake", " in spring")


def test_the_own_name_comes_first_then_promoted_tokens_then_what_stands_around(made):
    other = [place("a man by the", " house", " in spring")] * 10
    catalog = made(
        [
            concept(contexts=[LAKE] * 4 + other[4:]),
            concept(contexts=[FIRE] * 9 + [LAKE]),
            concept("firefly · x · y", promoted=["firefly"], contexts=other),
            concept("flame · fire", promoted=[" flame", " Fire"], promoted_logits=[1.0, 0.5], contexts=other),
            concept("fire · flame", promoted=[" fire", " flame"], promoted_logits=[1.0, 0.9], contexts=other),
            concept("fire", name_source="names.json", contexts=other),
            concept(contexts=other),
        ]
    )
    hits = search_catalog(catalog.folder, "FIRE", 10)
    assert [hit.concept_id for hit in hits] == [5, 4, 2, 3, 1, 0]
    assert hits[-2].context == FIRE
    assert [hit.concept_id for hit in catalog.search("Flame · Fire", 2)] == [3, 4]  # a name need not be given


def test_promoted_tokens_count_by_rank_and_logit_even_where_every_context_has_the_word(made):
    everywhere = [place("return ", "None", " if")] * 10
    promoting = [(["x", " None"], [2.0, 2.0]), (["None"], [0.9]), (["None"], [8.0]), (["x", ".None,"], [2.0, 1.9])]
    concepts = [concept(promoted=tokens, promoted_logits=logits) for tokens, logits in promoting]
    catalog = made([dataclasses.replace(each, contexts=everywhere) for each in [concept(), *concepts]])
    assert [hit.concept_id for hit in catalog.search("None", 5)] == [3, 1, 4, 2, 0]


def test_a_planted_word_is_found_first(built, reader):
    catalog = built(reader)
    context = catalog.concept(11).contexts[0]
    table, names = catalog.table, catalog.table["name"].to_pylist()
    names[11] = "Zeppelin"
    table = table.set_column(1, "name", [names]).set_column(2, "name_source", [["names.json"] * len(names)])
    planted = Catalog(catalog.folder, catalog.info, table)
    assert planted.search("zeppelin", 3)[0].concept_id == 11
    assert planted.search("zeppelin", 3)[0].context == context


def test_whole_words_come_before_parts_of_words(made):
    part = place("the", " firefly", " glows")
    assert [hit.concept_id for hit in made([concept(contexts=[part]), concept(contexts=[FIRE])]).search("fire", 5)] == [
        1,
        0,
    ]


def test_a_token_counts_with_the_rest_of_its_word(made):
    split = place("near the zep", "pel", "in hangar")
    apart = place("the zeppelin", " rose", " up")
    sign = place("a big ", "(", "zeppelin)")
    catalog = made([concept(contexts=[apart]), concept(contexts=[sign]), concept(contexts=[split])])
    assert catalog.search("zeppelin", 3)[0].concept_id == 2
    assert len(catalog.search("zeppelin", 3)) == 3


def test_concepts_that_are_active_everywhere_count_less(made):
    catalog = made([concept(frequency=0.9, contexts=[FIRE] * 2), concept(frequency=0.001, contexts=[FIRE])])
    assert [hit.concept_id for hit in catalog.search("fire", 5)] == [1, 0]


def test_signs_and_other_scripts_are_found_as_they_are(made):
    catalog = made([concept(contexts=[place("if a", " !=", " b")]), concept(contexts=[place("über ", "北京", "。")])])
    assert [hit.concept_id for hit in catalog.search("!=", 5)] == [0]
    assert [hit.concept_id for hit in catalog.search("(", 5)] == []
    assert [hit.concept_id for hit in catalog.search("北京", 5)] == [1]
    assert [hit.concept_id for hit in catalog.search("京", 5)] == [1]
    assert [hit.concept_id for hit in catalog.search("ÜBER", 5)] == [1]


def test_no_text_is_read_as_a_query_language(made):
    catalog = made([concept(contexts=[FIRE])])
    operators = (
        """ " ' ""fire" fire* (fire NEAR(fire name:fire -fire ^ { * *OR a\0b \u200b \x01 % ;DROP \ufffd \U0001f642 """
    )
    for text in (*operators.split(" ")[1:-1], operators, "(fire OR", "NEAR(fire lake, 2)", "word " * 3000):
        assert len(catalog.search(text, 5)) <= 1
    assert [hit.concept_id for hit in catalog.search("fire", 5)] == [0]


def test_a_search_for_nothing_is_refused(made):
    with pytest.raises(InputError, match="nothing to search for"):
        made([concept()]).search("  ", 5)
    with pytest.raises(InputError, match="not valid Unicode"):
        made([concept()]).search("a\ud800", 5)


def test_a_concept_that_the_catalog_has_not_is_refused(made):
    catalog = made([concept(), concept("second")])
    assert show_concept(catalog.folder, 1).name == "second"
    assert catalog.names == {0: "a · b · c", 1: "second"}
    for concept_id in (-1, 2):
        with pytest.raises(InputError, match=rf"no concept {concept_id} in the catalog .*; it has 0 to 1"):
            catalog.concept(concept_id)


def test_a_concept_is_found_by_its_name(made):
    catalog = made(
        [concept("Website address"), concept("the address"), concept("river"), concept("river bank", name_source="a")]
    )
    assert catalog.find("website address") == 0
    assert catalog.find(" River ") == 2  # exactly so called, though another fits too
    assert catalog.find("bank") == 3
    with pytest.raises(InputError, match="no concept fits the name 'ocean'"):
        catalog.find("ocean")


def test_a_name_that_several_concepts_have_lists_them(made):
    catalog = made([concept("river"), concept("river"), concept("lake")])
    expected = r"several concepts fit the name 'river': 0 \(river\), 1 \(river\); give a number instead"
    with pytest.raises(InputError, match=expected):
        catalog.find("river")
    named = made([concept("old lake", name_source="a"), concept("new lake", name_source="a")])
    with pytest.raises(InputError, match=r"fit the name 'lake': 0 \(old lake\), 1 \(new lake\)"):
        named.find("lake")


# What a person sees


def test_a_concept_is_described_without_anything_that_a_terminal_obeys(monkeypatch):
    context = place("one\ntwo\033[31m", " fire", "\t!")
    text = describe(concept(contexts=[context], promoted=["\n"]))
    assert "concept 0: a · b · c" in text
    assert r"one⏎two\x1b[31m« fire»⇥!   (a.txt)" in text
    assert "«⏎» +1.0" in text
    assert "7 times, 0.7 % of tokens" in text
    assert "\033" not in text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in describe(concept(contexts=[context]))
    monkeypatch.delenv("NO_COLOR")
    assert "\033[1m« fire»\033[0m" in describe(concept(contexts=[context]))
    assert describe(concept()).endswith("never active on the text that was read")


def test_hits_line_up():
    hits = [Hit(3, "a", 0.5, 12345, 1.0, FIRE), Hit(1234, "longer name", 0.00012, 1, 0.5, None)]
    header, first, second = hits_table(hits).splitlines()
    assert first == "      3     50 %  12,345  a            they lit a« fire» by the lake"
    assert second == "   1234  0.012 %       1  longer name"
    assert header.index("where") == first.index("they")
    assert hits_table([]) == "no concept found"


def test_concepts_that_no_model_has_learned_are_left_out(made) -> None:
    """Unless they are asked for by name; a learned concept with the same name takes precedence."""
    never, dead = concept("fire", label_count=0, contexts=[FIRE]), concept("fire", frequency=0.0)
    learned = concept("fire and water", promoted=["fire"])
    catalog = made([never, dead, learned, concept("fire", label_count=1), concept("fire place", label_count=0)])
    assert [hit.concept_id for hit in catalog.search("fire", 8)] == [3, 2]
    assert catalog.steerable == [2, 3]
    assert catalog.find("fire") == 3
    assert catalog.find("fire place") == 4
