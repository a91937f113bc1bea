#!/usr/bin/env bash
# Makes everything under assets/lite anew: towers, then the three decoders. Each step goes on where it was stopped.
#   bash train/lite/make.sh DATA WORK
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
data=${1:-../shared/data}
work=${2:-work/lite}

OMP_NUM_THREADS=1 python -m train.lite.stem_cache --data "$data" --work "$work" &
stem=$!
trap 'kill "$stem" 2>/dev/null || true' EXIT
OMP_NUM_THREADS=1 python -m train.lite.text_targets --work "$work"
OMP_NUM_THREADS=1 python -m train.lite.text_tower --work "$work" --minutes 15
wait "$stem"
python -m train.lite.image_tower --data "$data" --work "$work" --minutes 90
python -m train.lite.build --work "$work" --output assets/lite/clip

for arm in ldvc ldvc_without_lcsa zegclip; do
  accelerate launch --cpu --num_processes 1 train/train.py --config lite_release --arm "$arm" --data "$data" \
    --output_dir "$work/release/$arm" --cache_dir "$work/cache" --resume_from_checkpoint latest
done
python train/evaluate.py --checkpoint "$work"/release/{ldvc,ldvc_without_lcsa,zegclip} --data "$data" --sets msrc coco-mini \
  --clip_arm lite --cache_dir "$work/cache" --calibrate
python -m train.lite.publish --release "$work/release" --output assets/lite
