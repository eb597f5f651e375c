package cli

import (
	"context"
	"log/slog"

	"platter/aio"
	"platter/config"
	"platter/export"
)

// logStats tells what an export has done: one line, in which an operation that
// nobody asked for doesn't stand.
func logStats(path string, s export.Stats) {
	attrs := []slog.Attr{slog.String("image", path)}
	for op := range aio.Op(aio.OpCount) {
		if s.Requests[op] == 0 {
			continue
		}
		of := []any{slog.Uint64("requests", s.Requests[op])}
		if s.Bytes[op] > 0 {
			of = append(of, slog.String("size", config.Size(s.Bytes[op]).String()))
		}
		h := &s.Latency[op]
		of = append(of, slog.Duration("p50", h.Quantile(0.5)), slog.Duration("p99", h.Quantile(0.99)), slog.Duration("max", h.Quantile(1)))
		attrs = append(attrs, slog.Group(op.String(), of...))
	}
	attrs = append(attrs, slog.Uint64("batches", s.Batches), slog.Uint64("merged", s.Merged), slog.Uint64("refused", s.Refused))
	if s.Gaps.Writes > 0 {
		attrs = append(attrs, slog.Group("gaps", slog.Uint64("writes", s.Gaps.Writes), slog.String("size", config.Size(s.Gaps.Bytes).String())))
	}
	slog.LogAttrs(context.Background(), slog.LevelInfo, "served", attrs...)
}
