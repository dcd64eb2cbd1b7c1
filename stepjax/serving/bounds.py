"""What is refused of a chat before anything is made of it: too much text, too many images, images from elsewhere."""

from stepjax.serving.bodies import has_more_values
from stepjax.serving.errors import ApiError, TooLongError
from stepjax.serving.schemas import ChatRequest, ImagePart, Message
from stepjax.serving.settings import Limits

# A token has more bytes, mostly: what is too long is told to be so by no more than it is.
_BYTES_PER_TOKEN = 2


def check_chat_text(request: ChatRequest, limits: Limits) -> None:
    """
    Raises:
        ApiError: messages and tools together hold too much, or the arguments of a call do.
    """
    tools = sum(len(tool.model_dump_json().encode()) for tool in request.tools or ())
    check_text(tools + sum(_text_bytes(message) for message in request.messages), "messages", limits)
    for i, message in enumerate(request.messages):
        for j, call in enumerate(message.tool_calls or ()):
            if has_more_values(call.function.arguments.encode(errors="replace"), limits.body_values):
                where = f"messages[{i}].tool_calls[{j}].function.arguments"
                message = f"{where}: its JSON holds more than {limits.body_values} values"
                raise ApiError(400, message, param=where, code="too_many_values")


def check_text(size: int, where: str, limits: Limits) -> None:
    """
    Raises:
        TooLongError: so many bytes are too many.
    """
    if size > limits.text_bytes:
        message = f"{where}: {size} bytes of text are more than the limit of {limits.text_bytes}"
        raise TooLongError(message, param=where, excess=1 + (size - limits.text_bytes) // _BYTES_PER_TOKEN)


def image_urls(request: ChatRequest, limits: Limits, *, allow_remote: bool) -> dict[tuple[int, int], str]:
    """URLs of images, by the indices of their message and part.

    Raises:
        ApiError: 400, there are too many, or one would have to be fetched and that is not allowed.
    """
    urls = {
        (i, j): part.image_url.url
        for i, message in enumerate(request.messages)
        if isinstance(message.content, list)
        for j, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    }
    if len(urls) > limits.images:
        message = f"messages hold {len(urls)} images, more than the limit of {limits.images}"
        raise ApiError(400, message, param="messages", code="too_many_images")
    for at, url in urls.items():
        if not is_data_uri(url) and not allow_remote:
            where = place_of(at)
            message = f"{where}: images are not fetched from URLs here; send a data URI: data:image/...;base64,..."
            raise ApiError(400, message, param=where, code="remote_images_not_allowed")
    return urls


def is_data_uri(url: str) -> bool:
    return url[:5].lower() == "data:"


def place_of(at: tuple[int, int]) -> str:
    """What errors call an image."""
    return f"messages[{at[0]}].content[{at[1]}].image_url.url"


def _text_bytes(message: Message) -> int:
    texts = [message.reasoning_content, message.name, message.tool_call_id]
    if isinstance(message.content, str):
        texts.append(message.content)
    elif message.content is not None:
        texts += [part.text for part in message.content if not isinstance(part, ImagePart)]
    for call in message.tool_calls or ():
        texts += [call.id, call.function.name, call.function.arguments]
    return sum(utf8_length(text) for text in texts if text)


def utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
