"""What servers and samplers ask of a processor: STEP3-VL's, or that of a model which reads text alone."""

from stepjax.interop.text_processor import TextProcessor
from stepjax.processing.processor import Processor
from stepjax.processing.tokens import Example, check_length, least_tokens

AnyProcessor = Processor | TextProcessor

_TAIL = 16  # tokens at the end of a prompt, enough for `<think>` however it is spelled


def encode(processor: AnyProcessor, text: str, *, max_tokens: int | None = None, name: str = "prompt") -> list[int]:
    """Ids of a text to go on with. STEP3-VL's are never those of control tokens.

    Raises:
        ContextLengthError: the length of the text alone tells that it has more than `max_tokens`.
    """
    encoder = processor if isinstance(processor, TextProcessor) else processor.tokenizer
    check_length(least_tokens(text, encoder.longest_token), max_tokens, name, at_least=True)
    return encoder.encode(text)


def vocab_size(processor: AnyProcessor) -> int:
    return processor.vocab_size if isinstance(processor, TextProcessor) else processor.tokenizer.vocab_size


def image_token(processor: AnyProcessor) -> int | None:
    """The id that stands for an image's features."""
    return None if isinstance(processor, TextProcessor) else processor.tokenizer.special_tokens.image_patch


def starts_thinking(processor: AnyProcessor, prompt: Example) -> bool:
    """Whether the prompt has opened `<think>` for the model."""
    return processor.decode(prompt.tokens[-_TAIL:].tolist(), False).rstrip().endswith("<think>")
