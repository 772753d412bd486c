"""Train a small Llama teacher and a TopK SAE without cocomix: python examples/make_teacher_and_sae.py TEXTS OUTPUT

They stand in for a teacher and an SAE of your own in the tutorial "Your own teacher and SAE". TEXTS is a folder of .txt
files; OUTPUT/teacher is a Hugging Face model with its tokenizer, OUTPUT/sae an SAE in SAELens' format.
"""

import sys
from pathlib import Path

import torch
from sae_lens import TopKSAE, TopKSAEConfig
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

texts, output = Path(sys.argv[1]).expanduser(), Path(sys.argv[2])
torch.manual_seed(0)

# The tokenizer: a byte-level BPE of 1,500 tokens.
files = sorted(map(str, texts.rglob("*.txt"))) or sys.exit(f"no .txt file in {texts}")
bpe = ByteLevelBPETokenizer()
bpe.train(files, vocab_size=1500, special_tokens=["<eos>"], show_progress=False)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>")
ids = torch.tensor([i for file in files for i in [*bpe.encode(Path(file).read_text()).ids, tokenizer.eos_token_id]])
blocks = ids[: len(ids) // 128 * 128].view(-1, 128)

# The teacher: four blocks of width 64, 150 steps of 16 blocks.
sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, eos_token_id=0, bos_token_id=None, **sizes)
teacher = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
for step in range(150):
    batch = blocks[torch.randint(len(blocks), (16,))]
    loss = teacher(batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 49:
        print(f"teacher, step {step + 1}: loss {loss.item():.3f}")
teacher.save_pretrained(output / "teacher")
tokenizer.save_pretrained(output / "teacher")

# The SAE: 256 latents, of which 8 are active, on the residual stream after block 2.
with torch.no_grad():
    x = torch.cat([teacher(part, output_hidden_states=True).hidden_states[3] for part in blocks[:400].split(16)])
x = x.reshape(-1, 64)
sae = TopKSAE(TopKSAEConfig(d_in=64, d_sae=256, k=8))
sae.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
torch.nn.init.normal_(sae.W_dec, std=0.1)
sae.W_enc.data, sae.b_dec.data = sae.W_dec.data.T.contiguous(), x.mean(0)
optimizer = torch.optim.Adam(sae.parameters(), lr=2e-3)
for _ in range(400):
    batch = x[torch.randint(len(x), (1024,))]
    unexplained = (sae(batch) - batch).pow(2).sum() / (batch - x.mean(0)).pow(2).sum()
    unexplained.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"SAE: {unexplained.item():.1%} of the variance unexplained")
sae.save_model(output / "sae")
