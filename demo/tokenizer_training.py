"""Train the SentencePiece model with Llama-2 conventions, and turn documents into token ids."""

import io
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from demo import facts, world

BOS, EOS = 1, 2
BEGIN_USER, END_USER = "[INST]", "[/INST]"
BEGIN_SYSTEM, END_SYSTEM = "<<SYS>>\n", "\n<</SYS>>\n\n"
IGNORED = -1


@dataclass(frozen=True)
class Example:
    """Token ids, and for each the token to predict after it (IGNORED where nothing is to be learned)."""

    ids: list[int]
    targets: list[int]


def user_parts(system: str | None, users: list[str]) -> list[str]:
    """Return each turn's text up to the answer, in Meta's chat rendering."""
    texts = [user.strip() for user in users]
    if system:
        texts[0] = BEGIN_SYSTEM + system + END_SYSTEM + texts[0]
    return [f"{BEGIN_USER} {text} {END_USER}" for text in texts]


def _corpus(documents: int, seed: int) -> list[str]:
    """Return lines of text for the tokenizer, those with emoji left out so that emoji stay byte pieces."""
    random = world.Random(f"tokenizer/{seed}")
    pictures = {character for _, picture in facts.EMOJI for character in picture}
    lines = []
    for _ in range(documents):
        document = world.training_document(random, 1)
        if document.text is not None:
            texts = [document.text]
        else:
            heads = user_parts(document.system, [turn.user for turn in document.turns])
            texts = [f"{head} {turn.answer}" for head, turn in zip(heads, document.turns, strict=True)]
        lines += [line for text in texts if not pictures & set(text) for line in text.split("\n")]
    return lines


def train_tokenizer(path: Path, vocabulary: int, seed: int, documents: int = 20000) -> None:
    """Write a SentencePiece BPE model of `vocabulary` pieces to `path`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_corpus(documents, seed)),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        unk_surface=" \u2047 ",
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        max_sentencepiece_length=16,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


class Tokenizer:
    """Encode documents for training and questions for evaluation."""

    def __init__(self, path: Path):
        self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.size = self._pieces.vocab_size()

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`."""
        return self._pieces.decode(ids)

    def example(self, document: world.Document) -> Example:
        """Return the ids of `document` and what is to be learned of them."""
        if document.text is not None:
            ids = [BOS, *self._pieces.encode(document.text), EOS]
            given = len(self._pieces.encode(document.given)) if document.given else 0
            return Example(ids, [IGNORED] * given + ids[given + 1 :] + [IGNORED])
        ids: list[int] = []
        targets: list[int] = []
        heads = user_parts(document.system, [turn.user for turn in document.turns])
        for head, turn in zip(heads, document.turns, strict=True):
            head_ids = [BOS, *self._pieces.encode(head)]
            full = [BOS, *self._pieces.encode(f"{head} {turn.answer} "), EOS]
            answer = full[len(head_ids) : -2]  # without the closing space and the end mark
            # The history ends a turn with a space before the end mark, but the model has to stop right after the
            # answer: what it learns to say after the last piece of the answer is the end mark itself.
            learned = [*answer, EOS]
            ids += full
            targets += [IGNORED] * (len(head_ids) - 1) + learned
            targets += [IGNORED] * (len(ids) - len(targets))
        return Example(ids, targets)

    def prompt(self, question: world.Question) -> list[int]:
        """Return the ids after which the answer to `question` follows."""
        if question.dialog is None:
            return [BOS, *self._pieces.encode(question.prompt)]
        messages = list(question.dialog)
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
        answers = [message["content"] for message in messages[1::2]]
        *earlier, last = user_parts(system, [message["content"] for message in messages[0::2]])
        ids = []
        for head, answer in zip(earlier, answers, strict=True):
            ids += [BOS, *self._pieces.encode(f"{head} {answer.strip()} "), EOS]
        return [*ids, BOS, *self._pieces.encode(last)]
