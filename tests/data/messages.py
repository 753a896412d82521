"""Messages of the conversations that tests read and label."""

ASK, ANSWER = {"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": " Ünn é "}
SYSTEM = {"role": "system", "content": "Be short."}
TOOL = {"role": "tool", "content": "12 °C"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "sky", "arguments": {"at": "Bonn"}}}],
}
THOUGHT = {"role": "assistant", "content": "Me.", "reasoning_content": "hm"}
