"""MemoryLLM and Flex-MemoryLLM, written from the paper's equations alone, one sequence at a time, nothing shared.

A slow and obvious reference in whatever dtype the weights have. `weights` maps names to tensors; it is laid out by
`tests/model/test_paper.py`. Notation of the paper: E (|V|, d), X_L (T, d), W_up and W_gate (K, d), W_down (d, K).
"""

import math

import torch


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def silu(x):
    return x / (1 + torch.exp(-x))


def ffn(x, w_up, w_gate, w_down):
    """Eq. 2.2."""
    return ((x @ w_up.T) * silu(x @ w_gate.T)) @ w_down.T


def rotate(vector, position, theta):
    """Rotary embedding of one head vector, pair (i, i + E/2) turned by position * theta^(-2i/E)."""
    half = vector.shape[0] // 2
    turned = vector.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / vector.shape[0])
        a, b = vector[i], vector[i + half]
        turned[i] = a * math.cos(angle) - b * math.sin(angle)
        turned[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def attention(x, w, heads, kv_heads, theta):
    """Causal attention, head by head, position by position."""
    length, d = x.shape
    size = d // heads
    out = torch.zeros_like(x)
    for head in range(heads):
        shared = head // (heads // kv_heads)
        q = x @ w["query"][head * size : (head + 1) * size].T
        k = x @ w["key"][shared * size : (shared + 1) * size].T
        v = x @ w["value"][shared * size : (shared + 1) * size].T
        q = torch.stack([rotate(q[t], t, theta) for t in range(length)])
        k = torch.stack([rotate(k[t], t, theta) for t in range(length)])
        for t in range(length):
            scores = torch.softmax(k[: t + 1] @ q[t] / math.sqrt(size), dim=0)
            out[t, head * size : (head + 1) * size] = scores @ v[: t + 1]
    return out @ w["output"].T


def ffn_c(x, w, eps):
    """Sec. 4.2; a SwiGLU, or one or two square matrices."""
    y = rms_norm(x, w["ffn_norm"], eps)
    if "c_gate" in w:
        return ffn(y, w["c_up"], w["c_gate"], w["c_down"])
    if "c_up" in w:
        y = silu(y @ w["c_up"].T)
    return y @ w["c_down"].T


def memory(token, embedding, w, eps):
    """One token's row in one layer: FFN_L(LN_L(E[t])) of Eq. 2.5, and a free table's row where there is one."""
    row = torch.zeros_like(embedding[0])
    if "m_up" in w:
        row = row + ffn(rms_norm(embedding[token], w["m_norm"], eps), w["m_up"], w["m_gate"], w["m_down"])
    return row + w["m_table"][token] if "m_table" in w else row


def logits(tokens, weights, *, architecture, heads, kv_heads, theta, eps):
    """Next-token logits (T, |V|) of one sequence of ids."""
    embedding = weights["embedding"]
    x = torch.stack([embedding[t] for t in tokens])
    for w in weights["layers"]:
        y = x + attention(rms_norm(x, w["attention_norm"], eps), w, heads, kv_heads, theta)
        if architecture == "dense":
            x = y + ffn(rms_norm(y, w["ffn_norm"], eps), w["up"], w["gate"], w["down"])
        else:  # Eq. 2.6; Flex adds FFN-C on the residual stream
            rows = torch.stack([memory(t, embedding, w, eps) for t in tokens])
            x = y + rows + (ffn_c(y, w, eps) if architecture == "flex" else 0)
    return rms_norm(x, weights["norm"], eps) @ weights["head"].T
