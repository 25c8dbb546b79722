"""A conversation as the model sees it, cut where learning begins and ends. The same text as chat_template.jinja gives (a test holds
them together); the template serves, this one trains, because training must know which characters are the assistant's.
"""

import json

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = [END_OF_TEXT, START, END, "<|pad|>"]
MARKS = ["<tool_call>", "</tool_call>", "<tools>", "</tools>", "<tool_response>", "</tool_response>"]

# What a piece is to the two stages: read only (0), learned while pretraining, learned always.
READ, TEXT, ANSWER = 0, 1, 2
Pieces = list[tuple[str, int]]


def plain(text: str) -> Pieces:
    return [(END_OF_TEXT, READ), (text, ANSWER), (END_OF_TEXT, ANSWER)]


def conversation(messages: list[dict], tools: list[dict] | None = None) -> Pieces:
    pieces = [(END_OF_TEXT, READ)]
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if system or tools:
        text = system
        if tools:
            lines = "".join(json.dumps(tool["function"], ensure_ascii=False) + "\n" for tool in tools)
            text += ("\n\n" if system else "") + f"# Tools\nYou may call these functions:\n<tools>\n{lines}</tools>\n"
            text += 'To call one, answer with\n<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>'
        pieces.append((f"{START}system\n{text}{END}\n", READ))
    for message in messages[1 if system else 0 :]:
        match message["role"]:
            case "assistant":
                calls = [
                    f'<tool_call>\n{{"name": {json.dumps(c["function"]["name"])}, "arguments": {c["function"]["arguments"]}}}\n</tool_call>'
                    for c in message.get("tool_calls") or []
                ]
                said = "\n".join(([message["content"]] if message.get("content") else []) + calls)
                pieces += [(f"{START}assistant\n", READ), (f"{said}{END}", ANSWER), ("\n", READ)]
            case "tool":
                pieces.append((f"{START}tool\n<tool_response>\n{message['content']}\n</tool_response>{END}\n", READ))
            case role:
                pieces += [(f"{START}{role}\n", READ), (f"{message['content']}{END}", TEXT), ("\n", READ)]
    return pieces
