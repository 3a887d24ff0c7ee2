"""Changes of a model that no constant makes: edits of a rung's text, each (old, new) as in an editor.

Those of v3 lead to v3_1 and to v4's positions; those of v4 are tried in the experiment two_hours.
"""

from harness.errors import UserError


def edited(text, edits):
    """`text` with every edit made. Raises ValueError if an old passage is not in it exactly once."""
    for old, new in edits:
        if text.count(old) != 1:
            raise UserError(f"an edit finds its place {text.count(old)} times instead of once: {old.strip()!r}")
        text = text.replace(old, new)
    return text


# ----------------------------------------------------------------------------------------------------------
# Of v3: each on top of those before it
# ----------------------------------------------------------------------------------------------------------

NORMED_EMBEDDINGS = (
    ("x = self.embedding(idx) +", "x = F.rms_norm(self.embedding(idx), (N_EMBD,)) +"),
    ("nn.init.normal_(p, std=0.02)\n            elif",
     'nn.init.normal_(p, std=0.1 if name == "embedding.weight" else 0.02)\n            elif'),
    # embeddings and head at the rate that v3_1 gives them, without decay
    ('''    matrices = [p for p in model.parameters() if p.dim() == 2]
''', '''    outer = [model.embedding.weight, model.head.weight]
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2] + [model.position_embedding.weight]
'''),
    ('{"params": vectors, "weight_decay": 0.0}]', '''{"params": vectors, "weight_decay": 0.0},
              {"params": outer, "weight_decay": 0.0, "factor": 0.01 / LEARNING_RATE}]'''),
    ('group["lr"] = LEARNING_RATE * lr_factor(step)',
     'group["lr"] = LEARNING_RATE * lr_factor(step) * group.get("factor", 1)'),
)  # fmt: skip
RMS_NORM = (
    ("self.norm_1 = nn.LayerNorm(N_EMBD)", "self.norm_1 = nn.RMSNorm(N_EMBD, elementwise_affine=False)"),
    ("self.norm_2 = nn.LayerNorm(N_EMBD)", "self.norm_2 = nn.RMSNorm(N_EMBD, elementwise_affine=False)"),
    ("self.norm = nn.LayerNorm(N_EMBD)", "self.norm = nn.RMSNorm(N_EMBD, elementwise_affine=False)"),
)
NO_BIASES = (
    ("nn.Linear(N_EMBD, 3 * N_EMBD)", "nn.Linear(N_EMBD, 3 * N_EMBD, bias=False)"),
    ("nn.Linear(N_EMBD, N_EMBD)", "nn.Linear(N_EMBD, N_EMBD, bias=False)"),
    ("nn.Sequential(nn.Linear(N_EMBD, 4 * N_EMBD), gelu, nn.Linear(4 * N_EMBD, N_EMBD))",
     "nn.Sequential(nn.Linear(N_EMBD, 4 * N_EMBD, bias=False), gelu, nn.Linear(4 * N_EMBD, N_EMBD, bias=False))"),
)  # fmt: skip
ZEROS = (
    ("nn.init.normal_(branch_end.weight, std=0.02 / math.sqrt(2 * N_LAYER))",
     "nn.init.zeros_(branch_end.weight)\n        nn.init.zeros_(self.head.weight)"),
    ("else 0.02)\n            elif", "else N_EMBD**-0.5)\n            elif"),
)  # fmt: skip
SCHEDULE = (
    ('''    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 + 0.5 * math.cos(math.pi * (step - WARMUP_STEPS) / max(1, MAX_STEPS - WARMUP_STEPS))
''', '''    return min(1, (step + 1) / WARMUP_STEPS, (MAX_STEPS - step) / (0.5 * MAX_STEPS))
'''),
)  # fmt: skip
RELU_SQUARED = (
    ("class Block(nn.Module):\n", """class ReLUSquared(nn.Module):
    def forward(self, x):
        return F.relu(x).square()


class Block(nn.Module):
"""),
    ('gelu = kernels.GELU()  # nn.GELU(approximate="tanh")', "gelu = ReLUSquared()"),
)
ROPE_IN_V3 = (
    ("import harness  # first", "from v4_alibi_rope import apply_rope, rope_table\nimport harness  # first"),
    (" + self.position_embedding.weight[: idx.size(1)]", ""),
    ('''        y = kernels.attention(q, k, v)''',
     '''        table = rope_table(torch.arange(T, device=x.device), C // self.n_head, 10000.0)
        q, k = apply_rope(q, table), apply_rope(k, table)
        y = kernels.attention(q, k, v)'''),
    ("        self.position_embedding = nn.Embedding(BLOCK_SIZE, N_EMBD)\n", ""),
)  # fmt: skip
ROPE_AFTER_THEM = (*ROPE_IN_V3, (" + [model.position_embedding.weight]", ""))  # on top of NORMED_EMBEDDINGS
STEPS_TO_V3_1 = {  # what is then left to v3_1 is its optimizer
    "embeddings normed, their own rate": NORMED_EMBEDDINGS,
    "RMSNorm without weights": RMS_NORM,
    "no biases": NO_BIASES,
    "zeros at the start": ZEROS,
    "linear cool-down": SCHEDULE,
    "ReLU squared": RELU_SQUARED,
}

# ----------------------------------------------------------------------------------------------------------
# Of v3: ways to train GPT-2's architecture
# ----------------------------------------------------------------------------------------------------------


def recipe(tied=True, zeros=True, cooldown=True, sinusoids=True, beta2=0.99, embedding_rate=1, position_rate=1,
           embedding_decay=True):  # fmt: skip
    """Edits of v3 that leave it a GPT-2: what its parameters start from, and how they are trained.

    tied: the last layer is the embedding. zeros: the ends of all branches, and a last layer of its own, start at zero.
    cooldown: the rate is constant after the warm-up and falls linearly to zero in the second half. sinusoids: position
    embeddings start as sinusoids of the size of the token embeddings. embedding_rate, position_rate: learning rates of
    the two embeddings (and of the last layer with the first) as multiples of LEARNING_RATE.
    """
    edits, ends = [], ""
    if tied:
        loop = "        for name, p in self.named_parameters():\n"
        edits.append((loop, "        self.head.weight = self.embedding.weight\n" + loop))
    if zeros:
        edits.append(("nn.init.normal_(branch_end.weight, std=0.02 / math.sqrt(2 * N_LAYER))",
                      "nn.init.zeros_(branch_end.weight)"))
        ends += "" if tied else "        nn.init.zeros_(self.head.weight)\n"
    if sinusoids:
        ends += ("        angles = torch.arange(BLOCK_SIZE)[:, None] * 1e4 ** (-torch.arange(0, N_EMBD, 2) / N_EMBD)\n"
                 "        waves = torch.cat([angles.sin(), angles.cos()], -1)  # (T, C)\n"
                 "        self.position_embedding.weight.data.copy_(0.02 * math.sqrt(2) * waves)\n")
    if ends:
        forward = "\n    def forward(self, idx, targets=None):\n"
        edits.append((forward, ends + forward))
    if cooldown:
        edits += SCHEDULE
    if beta2 != 0.95:
        edits.append(("betas=(0.9, 0.95)", f"betas=(0.9, {beta2})"))
    if (embedding_rate, position_rate, embedding_decay) != (1, 1, True):
        decay = "WEIGHT_DECAY" if embedding_decay else "0.0"
        edits += [
            ("matrices = [p for p in model.parameters() if p.dim() == 2]",
             "matrices = [p for p in model.blocks.parameters() if p.dim() == 2]"),
            ('{"params": vectors, "weight_decay": 0.0}]', f'''{{"params": vectors, "weight_decay": 0.0}},
              {{"params": [*dict.fromkeys((model.embedding.weight, model.head.weight))], "weight_decay": {decay},
               "factor": {embedding_rate}}},
              {{"params": [model.position_embedding.weight], "weight_decay": {decay}, "factor": {position_rate}}}]'''),
            ('group["lr"] = LEARNING_RATE * lr_factor(step)',
             'group["lr"] = LEARNING_RATE * lr_factor(step) * group.get("factor", 1)'),
        ]  # fmt: skip
    return tuple(edits)


# ----------------------------------------------------------------------------------------------------------
# Of v4
# ----------------------------------------------------------------------------------------------------------

TIED = (
    ("        for name, p in self.named_parameters():\n", """        self.head.weight = self.embedding.weight
        for name, p in self.named_parameters():\n"""),
    ('std=0.1 if name == "embedding.weight"', 'std=0.02 if name == "embedding.weight"'),
)
DROPOUT_INSIDE = (
    ("        self.proj = nn.Linear(4 * N_EMBD, N_EMBD, bias=False)\n", """\
        self.proj = nn.Linear(4 * N_EMBD, N_EMBD, bias=False)
        self.dropout = kernels.Dropout(DROPOUT)
"""),
    ("self.proj(F.relu(self.fc(x)).square())", "self.proj(self.dropout(F.relu(self.fc(x)).square()))"),
)


def weight_decay(rate):
    """Edits that let the matrices of the blocks decay by `rate` times the learning rate."""
    return (
        ("DROPOUT = 0.0  #", f"WEIGHT_DECAY = {rate}  # of the matrices of the blocks\nDROPOUT = 0.0  #"),
        ("                p.sub_(u, alpha", '''                p.mul_(1 - group["lr"] * WEIGHT_DECAY)
                p.sub_(u, alpha'''),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# Earlier words
# ----------------------------------------------------------------------------------------------------------

# Some results keep their edits in the words that the rungs had then. They make the same models as the edits above,
# which follow the text of today. Each is {hash of the words then: hash of the words now} (checks.words_of).
OTHER_WORDS = {
    "b54f95b08a69b37a": "e48b7c9afbd06a72",  # v3_to_v4: + no biases
    "e38674e6eb26821a": "e0a8d267e7ec07bd",  # v3_to_v4: + zeros at the start
    "d64d0303410438c1": "9ed0205c39dba445",  # v3_to_v4: + linear cool-down
    "3fb5f9f62b4e68b7": "8537a4b5f14b3e16",  # v3_to_v4: + ReLU squared
    "8253b3bb23f6d993": "5cf6d44e229032ed",  # v3_to_v4: v4 without Muon
    "7d1028886621aa47": "738664958b1f131d",  # v3_to_v4: v3, only RoPE
    "8d7ac03380b340c2": "633215ac8a98367d",  # two_hours: dropout in the MLP
}
