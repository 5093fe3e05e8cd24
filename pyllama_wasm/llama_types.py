"""The shapes that ``Llama`` takes and gives, by llama-cpp-python's names: OpenAI's, as typed dicts."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

__all__ = [
    "ChatCompletionChunk",
    "ChatCompletionFunction",
    "ChatCompletionFunctionCallOption",
    "ChatCompletionLogprobToken",
    "ChatCompletionLogprobs",
    "ChatCompletionMessageToolCall",
    "ChatCompletionMessageToolCallChunk",
    "ChatCompletionMessageToolCallChunkFunction",
    "ChatCompletionMessageToolCallFunction",
    "ChatCompletionMessageToolCalls",
    "ChatCompletionNamedToolChoice",
    "ChatCompletionRequestAssistantMessage",
    "ChatCompletionRequestFunctionCall",
    "ChatCompletionRequestFunctionMessage",
    "ChatCompletionRequestMessage",
    "ChatCompletionRequestResponseFormat",
    "ChatCompletionRequestSystemMessage",
    "ChatCompletionRequestToolMessage",
    "ChatCompletionRequestUserMessage",
    "ChatCompletionResponseChoice",
    "ChatCompletionResponseFunctionCall",
    "ChatCompletionResponseMessage",
    "ChatCompletionStreamResponseChoice",
    "ChatCompletionStreamResponseDelta",
    "ChatCompletionTool",
    "ChatCompletionToolChoiceOption",
    "ChatCompletionToolFunction",
    "ChatCompletionTopLogprobToken",
    "CompletionChoice",
    "CompletionChunk",
    "CompletionLogprobs",
    "CompletionUsage",
    "CreateChatCompletionResponse",
    "CreateChatCompletionStreamResponse",
    "CreateCompletionResponse",
    "CreateCompletionStreamResponse",
    "CreateEmbeddingResponse",
    "Embedding",
    "EmbeddingUsage",
    "JsonType",
    "PromptTokensDetails",
    "ResponseTimings",
]

JsonType = Any
"""A value of a parsed JSON text."""

# Keys that may be missing are in a class of their own (``total=False``): ``NotRequired`` is newer than Python 3.10.

# -- embeddings -------------------------------------------------------------------------------------------------------


class EmbeddingUsage(TypedDict):
    """Tokens that the texts had."""

    prompt_tokens: int
    total_tokens: int


class Embedding(TypedDict):
    """One text's vector, or the vectors of its tokens where nothing pools them."""

    index: int
    object: Literal["embedding"]
    embedding: list[float] | list[list[float]]


class CreateEmbeddingResponse(TypedDict):
    """What ``create_embedding`` returns."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


# -- completions ------------------------------------------------------------------------------------------------------


class PromptTokensDetails(TypedDict):
    """How many tokens of the prompt need not be computed again."""

    cached_tokens: int


class CompletionUsage(TypedDict):
    """Tokens taken in and given out; the token that ends a text is not counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(TypedDict):
    """Log probabilities by token; the first token of an echoed prompt has none."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(TypedDict):
    """The text, or a piece of it."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class _Completion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]


class ResponseTimings(TypedDict):
    """Where the time went, as llama.cpp's server writes it."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class CreateCompletionResponse(_Completion, total=False):
    """What ``create_completion`` returns; of a stream only a chunk after the last, if asked for, has a usage."""

    usage: CompletionUsage
    timings: ResponseTimings


CreateCompletionStreamResponse = CreateCompletionResponse
CompletionChunk = CreateCompletionResponse

# -- chat: answers ----------------------------------------------------------------------------------------------------


class ChatCompletionResponseFunctionCall(TypedDict):
    """A call as the deprecated ``functions`` has it."""

    name: str
    arguments: str


class ChatCompletionMessageToolCallFunction(TypedDict):
    """Name and arguments; these are a JSON text."""

    name: str
    arguments: str


class ChatCompletionMessageToolCall(TypedDict):
    """A call that the model wants made."""

    id: str
    type: Literal["function"]
    function: ChatCompletionMessageToolCallFunction


ChatCompletionMessageToolCalls = list[ChatCompletionMessageToolCall]


class _ResponseMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None


class ChatCompletionResponseMessage(_ResponseMessage, total=False):
    """The answer."""

    reasoning_content: str
    tool_calls: ChatCompletionMessageToolCalls
    function_call: ChatCompletionResponseFunctionCall


class ChatCompletionTopLogprobToken(TypedDict):
    """A token that might have come."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatCompletionLogprobToken(ChatCompletionTopLogprobToken):
    """A token that came, and those that might have come in its place."""

    top_logprobs: list[ChatCompletionTopLogprobToken]


class ChatCompletionLogprobs(TypedDict):
    """Log probabilities by token."""

    content: list[ChatCompletionLogprobToken] | None
    refusal: list[ChatCompletionLogprobToken] | None


class ChatCompletionResponseChoice(TypedDict):
    """The answer and how it ended."""

    index: int
    message: ChatCompletionResponseMessage
    logprobs: ChatCompletionLogprobs | None
    finish_reason: str | None


class _ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatCompletionResponseChoice]
    usage: CompletionUsage


class CreateChatCompletionResponse(_ChatCompletion, total=False):
    """What ``create_chat_completion`` returns."""

    timings: ResponseTimings


class ChatCompletionMessageToolCallChunkFunction(TypedDict, total=False):
    """A piece of a call: the name comes whole, the arguments in pieces."""

    name: str
    arguments: str


class _ToolCallChunk(TypedDict):
    index: int
    function: ChatCompletionMessageToolCallChunkFunction


class ChatCompletionMessageToolCallChunk(_ToolCallChunk, total=False):
    """A piece of the call number ``index``; the first one has the id."""

    id: str
    type: Literal["function"]


class ChatCompletionStreamResponseDelta(TypedDict, total=False):
    """What is new; the first one has the role, the last one is empty."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str
    tool_calls: list[ChatCompletionMessageToolCallChunk]
    function_call: ChatCompletionMessageToolCallChunkFunction


class ChatCompletionStreamResponseChoice(TypedDict):
    """A piece of the answer."""

    index: int
    delta: ChatCompletionStreamResponseDelta
    logprobs: ChatCompletionLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "function_call"] | None


class _ChatChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatCompletionStreamResponseChoice]


class CreateChatCompletionStreamResponse(_ChatChunk, total=False):
    """One chunk of ``create_chat_completion(stream=True)``; only one after the last, if asked for, has a usage."""

    usage: CompletionUsage
    timings: ResponseTimings


ChatCompletionChunk = CreateChatCompletionStreamResponse

# -- chat: requests ---------------------------------------------------------------------------------------------------


class ChatCompletionRequestSystemMessage(TypedDict):
    """Instructions."""

    role: Literal["system"]
    content: str | None


class ChatCompletionRequestUserMessage(TypedDict):
    """What the user says; parts are ``{"type": "text", "text": ...}``."""

    role: Literal["user"]
    content: str | list[dict[str, JsonType]] | None


class _AssistantMessage(TypedDict):
    role: Literal["assistant"]


class ChatCompletionRequestAssistantMessage(_AssistantMessage, total=False):
    """What the model said or called before."""

    content: str | None
    tool_calls: ChatCompletionMessageToolCalls
    function_call: ChatCompletionResponseFunctionCall


class ChatCompletionRequestToolMessage(TypedDict):
    """What a call gave."""

    role: Literal["tool"]
    content: str | None
    tool_call_id: str


class ChatCompletionRequestFunctionMessage(TypedDict):
    """What a call of the deprecated kind gave."""

    role: Literal["function"]
    content: str | None
    name: str


ChatCompletionRequestMessage = (
    ChatCompletionRequestSystemMessage
    | ChatCompletionRequestUserMessage
    | ChatCompletionRequestAssistantMessage
    | ChatCompletionRequestToolMessage
    | ChatCompletionRequestFunctionMessage
)


class _Function(TypedDict):
    name: str


class ChatCompletionFunction(_Function, total=False):
    """A function that may be called; its parameters are a JSON schema."""

    description: str
    parameters: dict[str, JsonType]


ChatCompletionToolFunction = ChatCompletionFunction


class ChatCompletionFunctionCallOption(TypedDict):
    """The function that is to be called."""

    name: str


ChatCompletionRequestFunctionCall = Literal["none", "auto"] | ChatCompletionFunctionCallOption


class ChatCompletionTool(TypedDict):
    """A tool that may be called."""

    type: Literal["function"]
    function: ChatCompletionFunction


class ChatCompletionNamedToolChoice(TypedDict):
    """The tool that is to be called."""

    type: Literal["function"]
    function: ChatCompletionFunctionCallOption


ChatCompletionToolChoiceOption = Literal["none", "auto", "required"] | ChatCompletionNamedToolChoice


class _ResponseFormat(TypedDict):
    type: Literal["text", "json_object", "json_schema"]


class ChatCompletionRequestResponseFormat(_ResponseFormat, total=False):
    """What the answer must be; ``schema`` goes with ``json_object``, ``json_schema`` with the type of that name."""

    schema: JsonType
    json_schema: dict[str, JsonType]
