"""Writing image tokens: with the KV cache and without, and transformers' GPT2 with the same weights, side by side in one process.

    python benchmarks/generation.py [--tokens 256] [--batch 4] [--width 128] [--layers 4] [--rounds 5] [--threads N] [--json FILE]

Every contender writes the same tokens greedily (checked). Every round runs every contender once, in another order; medians are reported.
"""
import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import nn

from diffcourse.core import default_device, generator
from diffcourse.priors import GPT, generate
from diffcourse.train import device_name
from side_by_side import interleaved, ratio


def network(tokens, width, layers, vocab=512):
    "A transformer with random weights, large enough that its greedy text is not one token repeated"
    model = GPT(vocab, tokens, layers, width // 32, width).eval()
    for i, p in enumerate(model.parameters()): nn.init.normal_(p, std=.15 if p.ndim > 1 else .3, generator=generator(i))
    nn.init.normal_(model.pos_emb, std=1.5, generator=generator(99))
    return model


def gpt2(model):
    "transformers' GPT2 with the same weights"
    import transformers
    C, V = model.tok_emb.weight.shape[1], model.tok_emb.weight.shape[0]
    config = transformers.GPT2Config(vocab_size=V, n_positions=model.block_size, n_embd=C, n_layer=len(model.blocks), n_head=model.blocks[0].heads,
                                     activation_function='gelu', tie_word_embeddings=False, attn_pdrop=0., embd_pdrop=0., resid_pdrop=0.,
                                     bos_token_id=None, eos_token_id=None, pad_token_id=0)
    theirs, mine, state = transformers.GPT2LMHeadModel(config).eval(), model.state_dict(), {}
    state |= {'transformer.wte.weight': mine['tok_emb.weight'], 'transformer.wpe.weight': mine['pos_emb'][0], 'lm_head.weight': mine['head.weight']}
    for p in ('weight', 'bias'):
        turn = (lambda v: v.T) if p == 'weight' else (lambda v: v)     # their Conv1D keeps matrices transposed
        state[f'transformer.ln_f.{p}'] = mine[f'ln_f.{p}']
        for i in range(len(model.blocks)):
            a, b = f'transformer.h.{i}.', f'blocks.{i}.'
            state |= {f'{a}ln_1.{p}': mine[f'{b}ln1.{p}'], f'{a}ln_2.{p}': mine[f'{b}ln2.{p}']}
            state[f'{a}attn.c_attn.{p}'] = turn(torch.cat([mine[f'{b}attn.{n}.{p}'] for n in ('query', 'key', 'value')]))
            for x, y in (('attn.c_proj', 'attn.proj'), ('mlp.c_fc', 'mlp.0'), ('mlp.c_proj', 'mlp.2')): state[f'{a}{x}.{p}'] = turn(mine[f'{b}{y}.{p}'])
    theirs.load_state_dict({k: v.contiguous() for k, v in state.items()})
    return theirs


def contenders(model, prompt, n) -> dict:
    "name → a function that writes so many tokens"
    table = {'diffcourse, KV cache': lambda n=n: generate(model, prompt, n, temperature=0),
             'diffcourse, without': lambda n=n: generate(model, prompt, n, temperature=0, cache=False)}
    try: theirs = gpt2(model)
    except ImportError: return table
    how = dict(do_sample=False, attention_mask=torch.ones_like(prompt))
    for name, cache in (('transformers GPT2, cache', True), ('transformers GPT2, without', False)):
        table[name] = lambda n=n, cache=cache: theirs.generate(prompt, use_cache=cache, max_new_tokens=n, min_new_tokens=n, **how)[:, prompt.shape[1]:]
    return table


def measure(table, rounds) -> dict:
    "name → seconds and CPU seconds of each round; every round in a new order"
    for write in table.values(): write(8)                                            # warm
    seconds, cpu, wrote = interleaved({k: lambda r, write=write: write() for k, write in table.items()}, rounds)
    ours = wrote['diffcourse, KV cache']
    same = {k: float((v == ours).double().mean()) for k, v in wrote.items()}
    return dict(seconds=seconds, cpu=cpu, same=same, different_tokens=len(ours.unique()))


def report(result, tokens) -> str:
    "A Markdown table; ratios are medians of the rounds' ratios"
    base, rows = 'diffcourse, without', ['| contender | tokens/s | against ours without cache | same, by CPU time | same tokens |', '|---|---:|---:|---:|---:|']
    for k, v in result['seconds'].items():
        rows.append(f'| {k} | {tokens / statistics.median(v):.0f} | {ratio(result["seconds"], base, k):.2f}× | {ratio(result["cpu"], base, k):.2f}× | {result["same"][k]:.0%} |')
    return '\n'.join(rows)


def main(argv=None):
    p = argparse.ArgumentParser(description='Writing image tokens, with a cache and without')
    for name, default in (('tokens', 256), ('batch', 4), ('width', 128), ('layers', 4), ('rounds', 5)): p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--threads', type=int)
    p.add_argument('--json', type=Path)
    a = p.parse_args(argv)
    if a.threads: torch.set_num_threads(a.threads)
    model = network(a.tokens, a.width, a.layers)
    result = measure(contenders(model, torch.randint(512, (a.batch, 1), generator=generator(0)), a.tokens), a.rounds)
    print(report(result, a.batch * a.tokens))
    print(f'\n{a.tokens} tokens, batch {a.batch}, {sum(p.numel() for p in model.parameters()):,} parameters; {result["different_tokens"]} different tokens occur; '
          f'{device_name(default_device())}, PyTorch {torch.__version__}')
    if a.json: a.json.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__': main()
