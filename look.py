"""What a trained model does with a text.

    model, tokenizer = harness.load("runs/v3")
    weights = look.attention_weights(model, torch.tensor([tokenizer.encode("The castle was built in")]))
"""

import torch


@torch.no_grad()
def attention_weights(model, idx):
    """How much each token (row) takes from each token (column) in every layer and head of a transformer of v2 to v4:
    (N_LAYER, B, H, T, T) for ids `idx` (B, T).

    The output of attention is linear in its values, a mean of them with these weights. So for values that are unit
    vectors, D tokens at a time, the output of each head is D columns of its weights. Queries, keys, positions and the
    causal mask stay those of the model, whatever it does with them.
    """
    model.eval()
    inputs, found = [], []
    modules = [block.attention for block in model.blocks]
    hooks = [module.register_forward_pre_hook(lambda module, args: inputs.append(args)) for module in modules]
    model(idx)
    for hook in hooks:
        hook.remove()
    (B, T), H = idx.shape, modules[0].n_head
    for module, args in zip(modules, inputs):
        D, columns = module.proj.in_features // H, []
        for start in range(0, T, D):
            values = torch.eye(T, device=idx.device)[:, start : start + D]  # (T, D): token j has unit vector j - start
            values = torch.nn.functional.pad(values, (0, D - values.size(1))).repeat(1, H)  # (T, C), alike in all heads

            def replace_values(module, args, output, values=values):
                return torch.cat([output[..., : -values.size(1)], values.to(output.dtype).expand(B, -1, -1)], -1)

            hooks = [module.qkv.register_forward_hook(replace_values),
                     module.proj.register_forward_pre_hook(lambda module, args: columns.append(args[0]))]  # fmt: skip
            module(*args)
            for hook in hooks:
                hook.remove()
        heads = [column.view(B, T, H, D).transpose(1, 2) for column in columns]  # (B, H, T, D)
        found.append(torch.cat(heads, -1)[..., :T])
    return torch.stack(found)
