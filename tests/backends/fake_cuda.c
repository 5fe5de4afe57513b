/* NVIDIA's driver interface over host memory, for tests of the code that calls it. Device addresses are host addresses.

   Where CUDA's own header is there, the compiler compares every prototype below with it. */
#include <stdlib.h>
#include <string.h>
#if __has_include(<cuda.h>)
#include <cuda.h>
#else
#include <stddef.h>
typedef int CUresult, CUdevice, CUdevice_attribute, CUstreamCaptureMode;
typedef unsigned long long CUdeviceptr, cuuint64_t;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUgraph_st *CUgraph;
typedef struct CUgraphExec_st *CUgraphExec;
typedef struct { size_t srcXInBytes, srcY; unsigned srcMemoryType; const void *srcHost; CUdeviceptr srcDevice; void *srcArray; size_t srcPitch,
  dstXInBytes, dstY; unsigned dstMemoryType; void *dstHost; CUdeviceptr dstDevice; void *dstArray; size_t dstPitch, WidthInBytes, Height; } CUDA_MEMCPY2D;
#define CUDAAPI
#define cuDeviceTotalMem cuDeviceTotalMem_v2
#define cuDevicePrimaryCtxRelease cuDevicePrimaryCtxRelease_v2
#define cuMemGetInfo cuMemGetInfo_v2
#define cuMemAlloc cuMemAlloc_v2
#define cuMemFree cuMemFree_v2
#define cuMemcpyHtoDAsync cuMemcpyHtoDAsync_v2
#define cuMemcpyDtoHAsync cuMemcpyDtoHAsync_v2
#define cuMemcpyDtoDAsync cuMemcpyDtoDAsync_v2
#define cuMemcpy2DAsync cuMemcpy2DAsync_v2
#define cuStreamDestroy cuStreamDestroy_v2
#define cuStreamBeginCapture cuStreamBeginCapture_v2
#endif

#define BLOCKS 4096
#define TOTAL (1ull << 30)
typedef void (*work)(void);
static struct { char *at; size_t size; } blocks[BLOCKS];
static size_t used, limit = TOTAL;
static int context, stream, capturing, launches;
static work recorded;

/* What tests ask and set. */
size_t fake_size(char *at) { for (int i = 0; i < BLOCKS; i++) if (blocks[i].at == at) return blocks[i].size; return 0; }
int fake_blocks(void) { int n = 0; for (int i = 0; i < BLOCKS; i++) n += blocks[i].at != 0; return n; }
void fake_limit(size_t bytes) { limit = bytes ? bytes : TOTAL; }
int fake_capturing(void) { return capturing; }
void fake_record(work w) { recorded = w; }
int fake_launches(void) { return launches; }

CUresult CUDAAPI cuInit(unsigned int flags) { return flags ? 1 : 0; }
CUresult CUDAAPI cuDriverGetVersion(int *version) { *version = 12060; return 0; }
CUresult CUDAAPI cuDeviceGetCount(int *count) { *count = 1; return 0; }
CUresult CUDAAPI cuDeviceGet(CUdevice *device, int ordinal) { *device = 7; return ordinal ? 101 : 0; }
CUresult CUDAAPI cuDeviceGetName(char *name, int size, CUdevice device) {
  strncpy(name, device == 7 ? "Fake GPU" : "?", size); return 0; }
CUresult CUDAAPI cuDeviceTotalMem(size_t *bytes, CUdevice device) { *bytes = TOTAL; return device == 7 ? 0 : 101; }
CUresult CUDAAPI cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
  *value = which == 75 ? 8 : which == 76 ? 7 : -1; return device == 7 ? 0 : 101; }
CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext *made, CUdevice device) {
  context++; *made = (CUcontext)&context; return device == 7 ? 0 : 101; }
CUresult CUDAAPI cuDevicePrimaryCtxRelease(CUdevice device) { context--; return device == 7 ? 0 : 101; }
CUresult CUDAAPI cuCtxSetCurrent(CUcontext given) { return given == (CUcontext)&context && context ? 0 : 201; }
CUresult CUDAAPI cuMemGetInfo(size_t *free, size_t *total) { *total = limit; *free = limit - used; return 0; }
CUresult CUDAAPI cuMemAlloc(CUdeviceptr *address, size_t size) {
  if (!size || !context || capturing) return 1;
  if (used + size > limit) return 2;
  for (int i = 0; i < BLOCKS; i++) if (!blocks[i].at) {
    blocks[i].at = aligned_alloc(256, (size + 255) / 256 * 256); blocks[i].size = size; used += size;
    memset(blocks[i].at, 0xAB, size); *address = (CUdeviceptr)(size_t)blocks[i].at; return 0; }
  return 2; }
CUresult CUDAAPI cuMemFree(CUdeviceptr address) {
  for (int i = 0; i < BLOCKS; i++) if (address && blocks[i].at == (char *)(size_t)address) {
    used -= blocks[i].size; free(blocks[i].at); blocks[i].at = 0; return 0; }
  return 1; }
static CUresult copy(void *target, const void *source, size_t size, CUstream s) {
  if (s != (CUstream)&stream || capturing) return 1;
  memcpy(target, source, size);
  return 0; }
CUresult CUDAAPI cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t n, CUstream s) { return copy((void *)(size_t)to, from, n, s); }
CUresult CUDAAPI cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t n, CUstream s) { return copy(to, (void *)(size_t)from, n, s); }
CUresult CUDAAPI cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream s) { return copy((void *)(size_t)to, (void *)(size_t)from, n, s); }
static size_t space(CUdeviceptr at) {
  for (int i = 0; i < BLOCKS; i++) {
    size_t offset = (size_t)at - (size_t)blocks[i].at;
    if (blocks[i].at && offset < blocks[i].size) return blocks[i].size - offset; }
  return 0; }
CUresult CUDAAPI cuMemcpy2DAsync(const CUDA_MEMCPY2D *c, CUstream s) {
  if (c->srcMemoryType != 2 || c->dstMemoryType != 2 || c->srcXInBytes || c->srcY || c->dstXInBytes || c->dstY) return 1;
  if (c->WidthInBytes > c->srcPitch || c->WidthInBytes > c->dstPitch) return 1;
  if (space(c->srcDevice) < (c->Height - 1) * c->srcPitch + c->WidthInBytes) return 700;
  if (space(c->dstDevice) < (c->Height - 1) * c->dstPitch + c->WidthInBytes) return 700;
  for (size_t i = 0; i < c->Height; i++)
    if (copy((char *)(size_t)c->dstDevice + i * c->dstPitch, (char *)(size_t)c->srcDevice + i * c->srcPitch, c->WidthInBytes, s)) return 1;
  return 0; }
CUresult CUDAAPI cuMemsetD8Async(CUdeviceptr at, unsigned char value, size_t n, CUstream s) {
  if (s != (CUstream)&stream || capturing || space(at) < n) return 1;
  memset((void *)(size_t)at, value, n);
  return 0; }
CUresult CUDAAPI cuStreamCreate(CUstream *made, unsigned int flags) { *made = (CUstream)&stream; return flags == 1 ? 0 : 1; }
CUresult CUDAAPI cuStreamDestroy(CUstream s) { return s == (CUstream)&stream ? 0 : 1; }
CUresult CUDAAPI cuStreamSynchronize(CUstream s) { return s == (CUstream)&stream && !capturing ? 0 : 1; }
CUresult CUDAAPI cuStreamBeginCapture(CUstream s, CUstreamCaptureMode mode) { capturing = 1; recorded = 0; return s && mode == 1 ? 0 : 1; }
CUresult CUDAAPI cuStreamEndCapture(CUstream s, CUgraph *made) { capturing = 0; *made = (CUgraph)recorded; return s && recorded ? 0 : 901; }
CUresult CUDAAPI cuGraphInstantiateWithFlags(CUgraphExec *ready, CUgraph graph, unsigned long long flags) {
  *ready = (CUgraphExec)graph; return graph && !flags ? 0 : 1; }
CUresult CUDAAPI cuGraphDestroy(CUgraph graph) { return 0; }
CUresult CUDAAPI cuGraphExecDestroy(CUgraphExec ready) { return ready ? 0 : 1; }
CUresult CUDAAPI cuGraphLaunch(CUgraphExec ready, CUstream s) { launches++; ((work)ready)(); return s == (CUstream)&stream ? 0 : 1; }
CUresult CUDAAPI cuGetErrorName(CUresult code, const char **name) {
  *name = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : code == 901 ? "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED" : "CUDA_ERROR_INVALID_VALUE";
  return 0; }
