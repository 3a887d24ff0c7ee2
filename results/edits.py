"""Changes of a model that no constant can make: edits of a rung's source, each (old, new) as in an editor."""

from harness.errors import UserError


def edited(text, edits):
    """`text` with every edit made. Raises ValueError if an old passage is not in it exactly once."""
    for old, new in edits:
        if text.count(old) != 1:
            raise UserError(f"the old text of an edit occurs {text.count(old)} times in the rung instead of once: "
                            f"{old.strip()!r}; adapt it in results/edits.py")  # fmt: skip
        text = text.replace(old, new)
    return text


# ----------------------------------------------------------------------------------------------------------
# v3: other ways to initialize and train GPT-2
# ----------------------------------------------------------------------------------------------------------

HEAD_OF_ITS_OWN = (
    ("        for name, p in self.named_parameters():\n", """\
        self.head = nn.Linear(N_EMBD, vocab_size, bias=False)
        for name, p in self.named_parameters():
"""),
    ("kernels.linear(x, self.embedding.weight)", "kernels.linear(x, self.head.weight)"),
)
SMALL_BRANCHES = (  # as in GPT-2: 2 * N_LAYER branches are summed, so their ends are scaled by 1 / sqrt(2 * N_LAYER)
    ('name.endswith(("bias", "proj.weight", "mlp.2.weight"))', 'name.endswith("bias")'),
    ("nn.init.zeros_(p)  # at the start every branch adds nothing", "nn.init.zeros_(p)"),
    ("                nn.init.normal_(p, std=0.02)\n", """\
                nn.init.normal_(p, std=0.02)
        for block in self.blocks:
            for branch_end in (block.attention.proj, block.mlp[-1]):
                nn.init.normal_(branch_end.weight, std=0.02 / math.sqrt(2 * N_LAYER))
"""),
)
RANDOM_POSITIONS = (
    ("        self.position_embedding.weight.data.copy_(0.02 * math.sqrt(2) * waves)  # of the size of the tokens\n",
     ""),
)
RANDOM_POSITIONS_IN_V3_1 = (("        self.position_embedding.weight.data.copy_(waves)\n", ""),)
COSINE = (
    ("""    return min(1, (step + 1) / max(1, WARMUP_STEPS), (MAX_STEPS - step) / max(1, COOLDOWN * MAX_STEPS))
""", """\
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 + 0.5 * math.cos(math.pi * (step - WARMUP_STEPS) / max(1, MAX_STEPS - WARMUP_STEPS))
"""),
)


def beta2(value):
    """Edits for another decay of AdamW's second moment."""
    return (("betas=(0.9, 0.999)", f"betas=(0.9, {value})"),)


def embedding_rates(tokens=1, positions=1, decay="WEIGHT_DECAY"):
    """Edits that give each of the two embeddings its own rate, as a multiple of LEARNING_RATE, and a decay."""
    return (
        ("matrices = [p for p in model.parameters() if p.dim() == 2]",
         "matrices = [p for p in model.blocks.parameters() if p.dim() == 2]"),
        ('{"params": vectors, "weight_decay": 0.0}]', f'''{{"params": vectors, "weight_decay": 0.0}},
              {{"params": [model.embedding.weight], "weight_decay": {decay}, "factor": {tokens}}},
              {{"params": [model.position_embedding.weight], "weight_decay": {decay}, "factor": {positions}}}]'''),
        ('group["lr"] = LEARNING_RATE * lr_factor(step)',
         'group["lr"] = LEARNING_RATE * lr_factor(step) * group.get("factor", 1)'),
    )  # fmt: skip


USUAL = (*HEAD_OF_ITS_OWN, *SMALL_BRANCHES, *RANDOM_POSITIONS, *COSINE, *beta2(0.95))
ROPE_IN_V3 = (
    ("import harness  # first", "from v4_alibi_rope import apply_rope, rope_table\nimport harness  # first"),
    (" + self.position_embedding.weight[: idx.size(1)]", ""),
    ("        y = kernels.attention(q, k, v)", """\
        table = rope_table(torch.arange(T, device=x.device), C // self.n_head, 10000.0)
        q, k = apply_rope(q, table), apply_rope(k, table)
        y = kernels.attention(q, k, v)"""),
    ("        self.position_embedding = nn.Embedding(BLOCK_SIZE, N_EMBD)\n", ""),
    *RANDOM_POSITIONS,
)

# ----------------------------------------------------------------------------------------------------------
# v3_1 and v4: AdamW for the matrices of the blocks
# ----------------------------------------------------------------------------------------------------------

ADAMW = (
    ("    muon = Muon(groups, lr=LEARNING_RATE, momentum=MOMENTUM)\n", """\
    matrices = [p for group in groups for p in group["params"]]
    muon = torch.optim.AdamW(matrices, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
"""),
)

# ----------------------------------------------------------------------------------------------------------
# v4
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

# The two edits below come from the records of modded-nanogpt (github.com/KellerJordan/modded-nanogpt), where a share is
# one number, that of the previous token with a gate (pull request 130). Here it is a number for each channel.

# adds a learned share of the previous token's embedding to each embedding; zero at the start
SMEAR = (
    ("    def forward(self, idx, targets=None, cache=None):\n", """\
        self.smear = nn.Parameter(torch.zeros(N_EMBD))

    def forward(self, idx, targets=None, cache=None):
"""),
    ("        self.length = 0  # tokens that all layers have seen\n", """\
        self.length = 0  # tokens that all layers have seen
        self.last = None  # embedding of the last of them
"""),
    ("        x = self.dropout(x)\n", """\
        before = x.new_zeros(len(x), 1, x.size(2)) if cache is None or cache.last is None else cache.last
        if cache:
            cache.last = x[:, -1:]
        x = self.dropout(x + self.smear * torch.cat([before, x[:, :-1]], 1))
"""),
)
# adds a learned share of the embedding to the input of each block; zero at the start
EMBEDDING_TO_BLOCKS = (
    ("    def forward(self, idx, targets=None, cache=None):\n", """\
        self.share = nn.ParameterList(torch.zeros(N_EMBD) for _ in self.blocks)

    def forward(self, idx, targets=None, cache=None):
"""),
    ("        for block in self.blocks:\n            x = block(x, rope, cache)\n", """\
        embedded = x
        for block, share in zip(self.blocks, self.share):
            x = block(x + share * embedded, rope, cache)
"""),
)


def embedding_rate(rate):
    """Edits that give the embedding its own rate; LEARNING_RATE_ADAMW then applies only to the output layer."""
    return (
        ("    others = [p for name, p in model.named_parameters() if not name.startswith(\"blocks\")]\n", f"""\
    others = [p for name, p in model.named_parameters() if not name.startswith(("blocks", "embedding"))]
    others = [{{"params": others}}, {{"params": [model.embedding.weight], "lr": {rate}}}]
"""),
    )  # fmt: skip


def weight_decay(rate):
    """Edits that let the matrices of the blocks decay by `rate` times the learning rate."""
    return (
        ("DROPOUT = 0.0  #", f"WEIGHT_DECAY = {rate}  # of the matrices of the blocks\nDROPOUT = 0.0  #"),
        ("                p.sub_(u, alpha", '''                p.mul_(1 - group["lr"] * WEIGHT_DECAY)
                p.sub_(u, alpha'''),
    )  # fmt: skip

# ----------------------------------------------------------------------------------------------------------
# Earlier texts of edits
# ----------------------------------------------------------------------------------------------------------

# Some results hold edits of a rung's earlier text. They make the same models as the edits above, which fit the current
# text: {hash of the edits then: hash of the edits now} (checks.words_of).
OTHER_WORDS = {
    "8d7ac03380b340c2": "633215ac8a98367d",  # two_hours: dropout in the MLP
}
