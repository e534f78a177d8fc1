"""From documents to rows, runs and comparisons."""

from anchor_attn.train.collator import PackedCollator as PackedCollator
from anchor_attn.train.collator import SplitCollator as SplitCollator
from anchor_attn.train.documents import Documents as Documents
from anchor_attn.train.documents import read_documents as read_documents
from anchor_attn.train.insert_anchor import insert_anchor as insert_anchor
from anchor_attn.train.packing import PackedRows as PackedRows
from anchor_attn.train.packing import pack_documents as pack_documents
from anchor_attn.train.streaming import PackedStream as PackedStream
from anchor_attn.train.streaming import StreamReport as StreamReport
from anchor_attn.train.streaming import StreamSource as StreamSource
from anchor_attn.train.streaming import create_loader as create_loader
from anchor_attn.train.streaming import read_report as read_report
from anchor_attn.train.tokenizers import ByteTokenizer as ByteTokenizer
from anchor_attn.train.tokenizers import load_tokenizer as load_tokenizer
